import json
import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads only wait for each other on tensors as small as these, and for long when the machine is busy."""
    if torch := sys.modules.get("torch"):  # a session that does without it stays without it
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_bpe():
    """Vocabulary and merges of a small byte-level BPE; its merges cross words, digits and spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(
        ["what's in the video? the cat  sat", "in 2024 and 20244 I'LL see", "café  crème\n\n\nwe're", "1000 100 10"],
        trainer,
    )
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]
