"""Values: what systemd.time(7) and the design promise about how things are written."""

import pytest

from taskd.config import values


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("1.5", 1.5),
        ("200ms", 0.2),
        ("15us", 0.000015),
        ("15µs", 0.000015),
        ("90s", 90),
        ("5min 20s", 320),
        ("2 h", 7200),
        ("2hours", 7200),
        ("48hr", 172800),
        ("1h30min", 5400),
        ("55s500ms", 55.5),
        ("300ms20s 5day", 432020.3),
        ("2m", 120),
        ("1w", 604800),
        ("1M", 2629800),
        ("1y 12month", 63115200),
        (".5h", 1800),
    ],
)
def test_a_span_is_read_as_systemd_reads_it(text: str, seconds: float) -> None:
    assert values.parse_span(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "fast", "5 parsecs", "-1s", "1h 30", "5S", "1,5s", "1e3", "infinite", "٣s", "s"]
)
def test_what_is_no_span_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"write one such as|not a unit of time"):
        values.parse_span(text)


def test_a_span_that_no_calendar_holds_is_refused() -> None:
    assert values.parse_span("1000y") == 1000 * 31557600
    with pytest.raises(ValueError, match="the most is 1000y"):
        values.parse_span("1001y")
    with pytest.raises(ValueError, match="the most is 1000y"):
        values.parse_span("9" * 400)


def test_infinity_is_a_limit_but_not_a_span() -> None:
    assert values.parse_limit("infinity") is None
    assert values.parse_limit("30min") == 1800
    with pytest.raises(ValueError, match="without end is not possible"):
        values.parse_span("infinity")
    for parse in values.parse_limit, values.parse_long_span:
        with pytest.raises(ValueError, match="longer than 0"):
            parse("0s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0"),
        (0.2, "200ms"),
        (20, "20s"),
        (5400, "1h 30min"),
        (30 * 86400, "30d"),
        (86461.000001, "1d 1min 1s 1us"),
        (0.1 + 0.2, "300ms"),
        (None, "infinity"),
    ],
)
def test_a_span_is_shown_as_it_would_be_written(seconds: float | None, text: str) -> None:
    assert values.format_span(seconds) == text
    back = values.parse_limit(text) if seconds else seconds
    assert back == (seconds if seconds is None else round(seconds, 6))


@pytest.mark.parametrize(
    ("text", "size", "shown"),
    [
        ("1", 1, "1"),
        ("65536", 65536, "64K"),
        ("8M", 8 << 20, "8M"),
        ("8 M", 8 << 20, "8M"),
        ("1.5G", 1536 << 20, "1536M"),
        ("2T", 2 << 40, "2T"),
        ("1048576T", 1 << 60, "1048576T"),
        ("512KB", 512 << 10, "512K"),
        ("1000B", 1000, "1000"),
    ],
)
def test_a_size_is_to_the_base_1024(text: str, size: int, shown: str) -> None:
    assert values.parse_size(text) == size
    assert values.format_size(size) == shown
    assert values.parse_size(shown) == size


@pytest.mark.parametrize("text", ["", "8m", "8MiB", "-1", "big", "0", "0.1", "9999999999T"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a (possible )?size"):
        values.parse_size(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("yes", True), ("true", True), ("on", True), ("1", True), ("Yes", True)]
    + [("no", False), ("false", False), ("off", False), ("0", False)],
)
def test_a_boolean_is_one_of_systemds_words(text: str, value: bool) -> None:
    assert values.parse_boolean(text) is value
    assert values.parse_boolean(values.format_boolean(value)) is value


@pytest.mark.parametrize("text", ["", "maybe", "2", "y es"])
def test_another_word_is_no_boolean(text: str) -> None:
    with pytest.raises(ValueError, match="neither yes nor no"):
        values.parse_boolean(text)


def test_a_number_is_plain_digits() -> None:
    assert values.parse_number("0") == 0
    assert values.parse_count("64") == 64
    for text in "", "-1", "+1", "1_0", "٣", "1.0", "1000001", "9" * 5000:
        with pytest.raises(ValueError, match="whole number"):
            values.parse_number(text)
    with pytest.raises(ValueError, match="write 1 or more"):
        values.parse_count("0")


def test_names_may_have_commas_or_spaces_between() -> None:
    assert values.parse_names("build, thumbnail") == ("build", "thumbnail")
    assert values.parse_names("build thumbnail,,build") == ("build", "thumbnail")


@pytest.mark.parametrize("text", ["127.0.0.1:6400", "localhost:1", "[::1]:65535"])
def test_an_address_is_a_host_and_a_port(text: str) -> None:
    assert values.parse_address(text) == text


@pytest.mark.parametrize(
    "text", ["localhost", ":80", "::1:80", "[::1:80", "::1]:80", "h:0", "h:65536", "h:x", "h:-1"]
)
def test_another_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        values.parse_address(text)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://taskd:s3cret@mq/%2f", "amqp://taskd:***@mq/%2f"),
        ("amqp://taskd@mq:5672/%2f", "amqp://taskd@mq:5672/%2f"),
        ("amqp://mq:5672/%2f", "amqp://mq:5672/%2f"),
        ("embedded:", "embedded:"),
        ("sqlite:////var/lib/a@b.db", "sqlite:////var/lib/a@b.db"),
        ("postgresql+psycopg://u:s3cret@[::1]/db", "postgresql+psycopg://u:***@[::1]/db"),
        ("mysql+pymysql://h/db?password=s3cret&x=1", "mysql+pymysql://h/db?password=***&x=1"),
        # Wrongly encoded, so not what their writer meant: all the more to be hidden.
        ("amqp://u:s3c/ret@mq/%2f", "amqp://u:***@mq/%2f"),
        ("amqp://u:s3c@ret@mq/%2f", "amqp://u:***@mq/%2f"),
        ("amqp://u:s3c#r?e/t@mq/%2f", "amqp://u:***@mq/%2f"),
        ("amqp://u/x:s3cret@mq", "amqp://u/x:***@mq"),
        ("amqp://u:s3c\nret@mq", "amqp://u:***@mq"),
    ],
)
def test_a_redacted_url_has_no_password(url: str, shown: str) -> None:
    assert values.redacted(url) == shown


def test_the_nearest_name_is_found_whatever_its_case() -> None:
    known = ["timeout", "stop_timeout", "Retries"]
    assert values.nearest("timout", known) == "timeout"
    assert values.nearest("TIMEOUT", known) == "timeout"
    assert values.nearest("retry", known) == "Retries"
    assert values.nearest("xyzzy", known) == ""


def test_a_quoted_text_is_one_short_line() -> None:
    assert values.quoted('a "b"\n') == r'"a \"b\"\n"'
    assert values.quoted("ü") == '"ü"'
    assert len(values.quoted("x" * 1000)) < 70
