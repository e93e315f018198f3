"""Text to tokens and back."""

from hypothesis import given
from hypothesis import strategies as st

from tokenworks.model.tokens import _LETTERS, Tokenizer, Vocabulary, _pieces

LETTERS = tuple(_LETTERS.values())
WORDS = Vocabulary(
    tokens=(*LETTERS, "th", "the", "Ġthe", "<|im_end|>"),
    merges=("t h", "th e", "Ġ the"),
    controls=(259,),
    digit_by_digit=True,
    end=259,
)


@given(st.text())
def test_every_text_comes_back(text: str) -> None:
    text = text.replace("<|im_end|>", "")
    tokenizer = Tokenizer(WORDS)
    encoded = tokenizer.encode(text)
    assert b"".join(map(tokenizer.bytes_of, encoded)) == text.encode()


@given(st.text())
def test_pieces_are_the_whole_text(text: str) -> None:
    assert "".join(_pieces(text, True)) == text


def test_neighbours_join_in_the_order_learned_and_marks_are_one_token() -> None:
    tokenizer = Tokenizer(WORDS)
    assert tokenizer.encode("the the<|im_end|>") == [257, 258, 259]
    assert tokenizer.bytes_of(259) == b""


def test_pieces_are_words_with_their_space_and_single_digits() -> None:
    assert _pieces("It's 42  now!\n", True) == ["It", "'s", " ", "4", "2", " ", " now", "!", "\n"]
    assert _pieces("a 42", False) == ["a", " 42"]
