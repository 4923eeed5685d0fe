"""The verbs that are about the connection itself, as Redis has them.

Every Redis client says some of these before its user says anything, and most give up where
one is refused. RESP2 alone is spoken: a client that asks for more hears -NOPROTO.
"""

from taskd import __version__
from taskd.control import resp
from taskd.control.connection import Call, Verb
from taskd.errors import RequestError

CHANNEL = b"events"


def ping(call: Call) -> None:
    word = _only(call) if call.words else None
    if call.client.subscribed:
        call.send(resp.array((resp.bulk(b"pong"), resp.bulk(word or b""))))
    elif word is not None:
        call.send(resp.bulk(word))
    else:
        call.simple("PONG")


def hello(call: Call) -> None:
    words = call.words
    if words and words[0] != b"2":
        call.error("unsupported protocol version", "NOPROTO")
        return
    options = words[1:]
    while options:
        match options:
            case [key, user, password, *options] if key.upper() == b"AUTH":
                if not _authenticate(call, user, password):
                    return
            case [key, name, *options] if key.upper() == b"SETNAME":
                call.client.rename(name)
            case _:
                raise RequestError("syntax error in HELLO")
    if not call.client.known:
        call.error("HELLO needs AUTH here: HELLO 2 AUTH default PASSWORD", "NOAUTH")
        return
    facts: dict[bytes, bytes] = {
        b"server": resp.bulk(b"taskd"),
        b"version": resp.bulk(__version__.encode()),
        b"proto": resp.integer(2),
        b"id": resp.integer(call.client.id),
        b"mode": resp.bulk(b"standalone"),
        b"role": resp.bulk(b"master"),
        b"modules": resp.array(()),
    }
    # A map, which RESP2 writes as an array of keys and values in turn.
    call.send(resp.array(part for key, value in facts.items() for part in (resp.bulk(key), value)))


def auth(call: Call) -> None:
    match call.words:
        case [password]:
            user = b"default"
        case [user, password]:
            pass
        case _:
            raise _arguments(call)
    if _authenticate(call, user, password):
        call.simple("OK")


def _authenticate(call: Call, user: bytes, password: bytes) -> bool:
    if call.client.authenticate(user, password):
        return True
    call.error("invalid username-password pair", "WRONGPASS")
    call.client.finish()
    return False


def client(call: Call) -> None:
    match [word.upper() for word in call.words[:1]] + call.words[1:]:
        case [b"SETNAME", name]:
            call.client.rename(name)
            call.simple("OK")
        case [b"SETINFO", _, _]:
            call.simple("OK")
        case [b"GETNAME"]:
            call.send(resp.bulk(call.client.name) if call.client.name else resp.NULL)
        case [b"ID"]:
            call.send(resp.integer(call.client.id))
        case _:
            raise RequestError("CLIENT knows SETNAME, SETINFO, GETNAME and ID")


def select(call: Call) -> None:
    if _only(call) != b"0":
        raise RequestError("there is only database 0")
    call.simple("OK")


def command(call: Call) -> None:
    """redis-cli asks for COMMAND DOCS, and is content with none."""
    call.send(resp.array(()))


def quit(call: Call) -> None:
    call.simple("OK")
    call.client.finish()


def reset(call: Call) -> None:
    call.client.forget()
    call.simple("RESET")


def unsubscribe(call: Call) -> None:
    if not call.words or CHANNEL in call.words:
        call.client.unsubscribe()
    left = int(call.client.subscribed)
    call.send(b"".join(confirm(b"unsubscribe", name, left) for name in call.words or [CHANNEL]))


def confirm(kind: bytes, channel: bytes, count: int) -> bytes:
    """How Redis answers SUBSCRIBE and UNSUBSCRIBE, once for each channel."""
    return resp.array((resp.bulk(kind), resp.bulk(channel), resp.integer(count)))


def _only(call: Call) -> bytes:
    if len(call.words) != 1:
        raise _arguments(call)
    return call.words[0]


def _arguments(call: Call) -> RequestError:
    return RequestError(f"wrong number of arguments for '{call.verb.lower()}' command")


VERBS: dict[str, Verb] = {
    "PING": ping,
    "HELLO": hello,
    "AUTH": auth,
    "CLIENT": client,
    "SELECT": select,
    "COMMAND": command,
    "QUIT": quit,
    "RESET": reset,
    "UNSUBSCRIBE": unsubscribe,
}
