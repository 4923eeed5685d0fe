"""What the tests of the whole daemon share: the same RabbitMQ as the tests of queues."""

from tests.queues.conftest import rabbitmq, vhost

__all__ = ["rabbitmq", "vhost"]
