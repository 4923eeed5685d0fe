"""What the tests of faults share: the same RabbitMQ as the other tests, for those that spare it."""

from tests.queues.conftest import rabbitmq, vhost

__all__ = ["rabbitmq", "vhost"]
