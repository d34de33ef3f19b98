"""Reward models of transformers, for tests/tests/it/rlhf_reward_model.rs.

  reward_model.py make OUT SEED   OUT/same: a random small model without a tokenizer, which reads the policy's ids
                                  OUT/other: one with a tokenizer and a chat template of its own
  reward_model.py check OUT RUN CASE
                                  every reward that RUN recorded is what OUT/CASE says of prompt and answer
"""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
from golden import randomise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<s>[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>[assistant]{% endif %}"
)
# Two implementations in fp32 through two small blocks: some 1e-7 a product, relative to values near 1.
TOLERANCE = 2e-5


def model(folder, vocab_size, generator, **keys):
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, num_labels=1, tie_word_embeddings=False, **keys,
    )  # fmt: skip
    made = LlamaForSequenceClassification(config).float().eval()
    randomise(made, generator)
    made.save_pretrained(folder)


def make(out, seed):
    generator = torch.Generator().manual_seed(seed)
    model(out / "same", 320, generator, pad_token_id=None, eos_token_id=256, bos_token_id=None)
    # Bytes in another order, so that every id means something else; the end of a turn is what fills rows up, as in
    # many published reward models.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    vocab = {"<s>": 0, "</s>": 1, **{letter: index + 2 for index, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("+", "1"), ("=", "?")][:0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )
    wrapped.save_pretrained(out / "other")
    model(out / "other", len(vocab), generator, pad_token_id=1, eos_token_id=1, bos_token_id=0)


def ids_of(case, folder, row):
    if case == "same":
        return row["prompt_ids"] + row["completion_ids"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert row["prompt"].startswith("user: ")
    said = [("user", row["prompt"].removeprefix("user: ")), ("assistant", row["completion"])]
    text = tokenizer.apply_chat_template([dict(role=role, content=text) for role, text in said], tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check(out, run, case):
    judge = LlamaForSequenceClassification.from_pretrained(out / case, dtype=torch.float32).eval()
    rows = [row for file in sorted(Path(run).glob("rollouts/*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert len(rows) >= 24, len(rows)
    worst = 0.0
    for row in rows:
        ids = torch.tensor([ids_of(case, out / case, row)])
        with torch.no_grad():
            expected = judge(ids, attention_mask=torch.ones_like(ids)).logits[0, 0].item()
        worst = max(worst, abs(row["reward"] - expected) / max(1.0, abs(expected)))
        assert dict(row["reward_parts"])["model"] == row["reward"], row
    assert len({row["reward"] for row in rows}) > 5, "the model says the same of everything"
    assert worst < TOLERANCE, worst
    print(json.dumps(dict(rows=len(rows), worst=worst)))


if __name__ == "__main__":
    verb, out, *rest = sys.argv[1:]
    make(Path(out), int(rest[0])) if verb == "make" else check(Path(out), *rest)
