"""Token streams as text: nothing lost, nothing broken, whatever the tokens."""

from __future__ import annotations

import random

import pytest
from tests.unit.target.tokenizers_for_tests import CHATML, byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from draftsmith.target.detokenise import BROKEN, Detokeniser, token_texts


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(CHATML)


def test_a_character_of_several_tokens_comes_out_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a🙂é.", add_special_tokens=False)["input_ids"]
    assert len(ids) == 8
    assert token_texts(tokenizer, ids) == ["a", "", "", "", "🙂", "", "é", "."]


def test_an_unfinished_character_is_held_back_until_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a🙂", add_special_tokens=False)["input_ids"][:-1]
    stream = Detokeniser(tokenizer)
    assert [stream.push(i) for i in ids] == ["a", "", "", ""]
    assert stream.flush() == BROKEN
    assert token_texts(tokenizer, ids) == ["a", "", "", BROKEN]


@pytest.mark.parametrize("skip", [True, False])
def test_the_texts_joined_are_the_decoded_whole(tokenizer: PreTrainedTokenizerFast, skip: bool) -> None:
    rng = random.Random(3)
    broken = 0
    for _ in range(60):
        # random bytes with words, whole characters and special tokens between them
        ids: list[int] = []
        for _ in range(rng.randrange(1, 12)):
            kind = rng.randrange(4)
            if kind == 0:
                ids += [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(4))]
            elif kind == 1:
                ids.append(rng.choice(tokenizer.all_special_ids))
            else:
                ids += tokenizer(rng.choice([" the", "\n\n", "é€🙂", "  x"]), add_special_tokens=False)["input_ids"]
        texts = token_texts(tokenizer, ids, skip_special_tokens=skip)
        assert len(texts) == len(ids)
        whole = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert "".join(texts) == whole
        assert not any(text.endswith(BROKEN) for text in texts[:-1])
        broken += BROKEN in whole
    assert broken > 10


def test_special_tokens_are_left_out_or_spelled(tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    a = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    assert token_texts(tokenizer, [a, end, a]) == ["a", "<|im_end|>", "a"]
    assert token_texts(tokenizer, [a, end, a], skip_special_tokens=True) == ["a", "", "a"]
    assert token_texts(tokenizer, []) == []


def test_spaces_that_a_tokenizer_drops_at_the_start_are_kept_inside() -> None:
    words = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2, "<unk>": 3}, unk_token="<unk>"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenizer.decode([1]) == "cat"  # alone, a word has lost its space
    assert token_texts(tokenizer, [0, 1, 2, 0]) == ["the", " cat", "s", " the"]
