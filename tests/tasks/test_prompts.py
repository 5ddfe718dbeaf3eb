import pytest

from realera.contracts import UserError
from realera.tasks.prompts import Wording, check_template, clean_name, fill, number, quoted_setting, same_name, slug


def test_clean_name_joins_spaces_and_keeps_the_letters() -> None:
    assert clean_name("  Tom \n Cruise ") == "Tom Cruise"
    assert clean_name("Beyoncé") == "Beyoncé"
    assert clean_name(747) == "747"


@pytest.mark.parametrize("typed", [None, "", "  \n ", "word " * 2000, "x" * 5000])
def test_clean_name_refuses_invalid_names(typed: object) -> None:
    with pytest.raises(UserError, match="concept=airplane"):
        clean_name(typed)


def test_the_article_follows_the_name() -> None:
    assert fill("a photo of a {}", "airplane").text == "a photo of an airplane"
    assert fill("A {} by the sea", "owl").text == "An owl by the sea"
    assert fill("a photo of a {}", "cat").text == "a photo of a cat"
    assert fill("a photo of the {}", "airplane").text == "a photo of the airplane"


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_contains_the_concept_once(template: str) -> None:
    with pytest.raises(UserError, match="once"):
        check_template(template)


@pytest.mark.parametrize("text", ["../../x", "/etc/passwd", "a" * 300, "日本", "Beyoncé", "..", "a/b", "~", "nul\0"])
def test_a_slug_is_a_plain_file_name(text: str) -> None:
    made = slug(text)
    assert made and set(made) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and len(made) <= 48
    assert not made.startswith("-")


def test_a_slug_is_readable_and_two_texts_never_share_one() -> None:
    assert slug("winged creature") == "winged-creature"
    texts = ["Boeing 747", "boeing 747", "boeing-747", "Beyoncé", "Beyonce", "a" * 60, "a" * 61]
    assert len({slug(t) for t in texts}) == len(texts)


def test_number_gives_every_word_the_same_seeds() -> None:
    words = [Wording("cat", "a photo of the cat", "cat"), Wording("dog", "a photo of the dog", "dog", "a dog")]
    prompts = number(words, "keep", 2, 5)
    assert [p.id for p in prompts] == ["keep-cat-0005", "keep-cat-0006", "keep-dog-0005", "keep-dog-0006"]
    assert [p.seed for p in prompts] == [5, 6, 5, 6]
    assert [p.caption for p in prompts] == [None, None, "a dog", "a dog"]


def test_a_name_is_the_same_with_other_accents_and_capitals() -> None:
    assert same_name("Salvador Dalí") == same_name("salvador DALI") != same_name("Salvador")


def test_a_setting_is_quoted_if_a_shell_would_split_it() -> None:
    assert quoted_setting("anchor", "sky") == "anchor=sky"
    assert quoted_setting("anchor", "a person") == "anchor='a person'"
