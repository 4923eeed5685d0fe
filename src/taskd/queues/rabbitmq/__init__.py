"""RabbitMQ: the only place that knows pika.

    Broker        one connection a URL, made again for ever
    RabbitQueue   one channel a queue section: consumes, settles, submits

https://www.rabbitmq.com/docs, and for the protocol AMQP 0-9-1 with RabbitMQ's extensions.
"""

from taskd.queues.rabbitmq.connection import Broker, show_pika
from taskd.queues.rabbitmq.queue import RabbitQueue

__all__ = ["Broker", "RabbitQueue", "show_pika"]
