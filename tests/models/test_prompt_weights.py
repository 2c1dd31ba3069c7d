import pytest

from library.models.prompt_weights import parse


@pytest.mark.parametrize(
    ("caption", "pieces"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("", []),
        ("a (cat)", [("a ", 1.0), ("cat", 1.1)]),
        ("((cat))", [("cat", 1.21)]),
        ("[cat]", [("cat", 1 / 1.1)]),
        ("(big:1.5) cat", [("big", 1.5), (" cat", 1.0)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("(a:-1)", [("a", -1.0)]),
        (r"\(cat\) \[x\]", [("(cat) [x]", 1.0)]),
        ("(open to the end", [("open to the end", 1.1)]),
        ("[open to the end", [("open to the end", 1 / 1.1)]),
        ("closed) only] here", [("closed) only] here", 1.0)]),
        ("time 12:30, a:b", [("time 12:30, a:b", 1.0)]),
        ("stray:1.5) end", [("stray:1.5) end", 1.0)]),
        ("a back\\slash", [("a back\\slash", 1.0)]),
        ("(a)(b)", [("ab", 1.1)]),
    ],
)
def test_brackets_weigh_what_they_enclose(caption, pieces):
    parsed = parse(caption)
    assert [text for text, _ in parsed] == [text for text, _ in pieces]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in pieces])
