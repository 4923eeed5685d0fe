"""Events: what happens to jobs, told to whoever subscribed over the control socket."""

from collections.abc import Callable
from typing import Any

OnEvent = Callable[[dict[str, Any]], None]


class Events:
    """Ask `if events:` before building one: mostly nobody listens."""

    def __init__(self) -> None:
        self._subscribers: dict[object, OnEvent] = {}

    def __bool__(self) -> bool:
        return bool(self._subscribers)

    def subscribe(self, on_event: OnEvent) -> Callable[[], None]:
        """Call `on_event` for each event; the result ends that, and is safe to repeat."""
        key = object()
        self._subscribers[key] = on_event

        def unsubscribe() -> None:
            self._subscribers.pop(key, None)

        return unsubscribe

    def publish(self, event: dict[str, Any]) -> None:
        # A subscriber that is too slow is dropped while it is told, so walk a copy.
        for on_event in list(self._subscribers.values()):
            on_event(event)
