"""A walk through the dead letters of a real RabbitMQ, while their queue goes."""

from tests.support.proxy import Proxy


def test_a_walk_whose_queue_goes_ends_when_each_copy_is_answered_for(rabbit):
    ours = rabbit.queue()
    rabbit.client.queue_declare(f"{ours.key}.dead", durable=True)
    for number in range(3):
        rabbit.publish(f"{ours.key}.dead", b"%d" % number)
    told = []

    def look(letter):
        # The walk hears of that when it asks for the next one.
        rabbit.client.queue_delete(f"{ours.key}.dead")
        return 1

    ours.source.visit(look, lambda letter, reason: told.append(("sent", reason)), told.append)
    rabbit.turn(lambda: None in told)
    assert told == [("sent", None), None]
    rabbit.turn(lambda: ours.deliveries)
    assert (ours.bodies, ours.deliveries[0].attempt) == ([b"0"], 1)


def test_a_walk_ends_with_the_connection(rabbit):
    with Proxy(rabbit.node.port) as proxy:
        through = rabbit.url.replace(f":{rabbit.node.port}/", f":{proxy.port}/")
        ours = rabbit.queue(broker=rabbit.broker(through))
        rabbit.client.queue_declare(f"{ours.key}.dead", durable=True)
        rabbit.publish(f"{ours.key}.dead")
        reasons = []
        ours.source.visit(lambda letter: proxy.cut(), print, reasons.append)
        rabbit.turn(lambda: reasons)
        assert reasons != [None]
        rabbit.until_depth(f"{ours.key}.dead", 1)
        rabbit.close_brokers()
