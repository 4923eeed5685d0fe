"""What the README shows is what lies in packaging/examples."""

from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
README = (TOP / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "language"),
    [("greet.conf", "ini"), ("producer.py", "python"), ("producer.php", "php")],
)
def test_a_listing_is_the_file(name, language):
    file = (TOP / "packaging" / "examples" / name).read_text()
    assert f"```{language}\n{file}```\n" in README


def test_every_file_that_is_linked_exists():
    links = [link.partition(")")[0] for link in README.split("](")[1:]]
    assert links
    assert [link for link in links if not (TOP / link).exists()] == []
