"""Supervised fine-tuning as TRL's SFTTrainer does it: token ids, labels, loss and gradients.

sft.py make FOLDER SEED: FOLDER/tokenizer is there; writes, for every case, its rows (NAME.jsonl), its chat template
where it has its own (NAME.jinja), what TRL makes of the rows (NAME.json), and for one batch of all of them a random
model with loss and gradients of TRL's own compute_loss, in float64, and how far float32 is off (NAME/).
"""

import copy
import json
import random
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from trl import SFTConfig, SFTTrainer
from trl.data_utils import maybe_convert_to_chatml

from golden import randomise, to_float64

MARKED = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
WORDS = ["apples", "two", "three", "caf\u00e9", "\u6f22\u5b57", "\U0001f600", "12 + 7", "x = [1, 2]", "\n\n", "the"]
WORDS += ["a lazy", "dog's", "#### 18", "<b>", "  "]
MAX_LENGTH = 96


def text(rng, most=14):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, most))).strip() or "so"


def message(role, content):
    return {"role": role, "content": content}


def conversation(rng):
    system = [message("system", text(rng))] if rng.random() < 0.5 else []
    turns = [[message("user", text(rng)), message("assistant", text(rng))] for _ in range(rng.randrange(1, 4))]
    return system + sum(turns, [])


def cases(rng):
    """Name, rows, the template where it is not the tokenizer's, and what TRL's configuration says."""
    rows = range(24)
    turns = lambda: [{"from": "user", "value": text(rng)}, {"from": "assistant", "value": text(rng)}]
    assistant = dict(assistant_only_loss=True)
    ends = ["", " ", "\n"]
    return [
        ("messages", [{"messages": conversation(rng)} for _ in rows], MARKED, assistant),
        ("sharegpt", [{"conversations": turns() + turns() * rng.randrange(2)} for _ in rows], MARKED, assistant),
        ("everything", [{"messages": conversation(rng)} for _ in rows], None, {}),
        ("prompts", [prompt_completion(conversation(rng)) for _ in rows], None, {}),
        ("texts", [{"prompt": text(rng) + rng.choice(ends), "completion": text(rng)} for _ in rows], None, {}),
        ("whole_texts", [{"prompt": text(rng), "completion": " " + text(rng)} for _ in rows], None,
         dict(completion_only_loss=False)),
    ]


def prompt_completion(messages):
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def draw_model(vocab_size, rng, generator):
    heads = rng.choice([2, 4])
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=heads * 8, intermediate_size=rng.randrange(40, 90), num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=rng.choice([1, 2]), head_dim=8, max_position_embeddings=256,
        tie_word_embeddings=rng.random() < 0.5, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    randomise(model, generator)
    return model


def loss_and_gradients(trainer, model, batch):
    model.zero_grad()
    # As the trainer counts them: targets of the whole step.
    count = (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def make(folder, seed):
    folder, rng, generator = Path(folder), random.Random(seed), torch.Generator().manual_seed(seed)
    names = []
    for name, rows, template, keys in cases(rng):
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        if template is not None:
            tokenizer.chat_template = template
            (folder / f"{name}.jinja").write_text(template)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = draw_model(len(tokenizer), rng, generator)
        config = SFTConfig(
            output_dir=str(folder / "trl"), max_length=MAX_LENGTH, use_cpu=True, report_to="none", bf16=False,
            fp16=False, shuffle_dataset=False, gradient_checkpointing=False, loss_type="nll", **keys,
        )
        # The trainer converts ShareGPT's rows itself, but only after it has refused to mask them.
        dataset = Dataset.from_list([maybe_convert_to_chatml(copy.deepcopy(row)) for row in rows])
        trainer = SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer)
        found = [dict(input_ids=row["input_ids"], labels=row["labels"]) for row in trainer.train_dataset]
        (folder / f"{name}.json").write_text(json.dumps(found))
        model.train().save_pretrained(folder / name / "model")
        batch = trainer.data_collator(found)
        _, grads32 = loss_and_gradients(trainer, model, batch)
        loss, grads64 = loss_and_gradients(trainer, to_float64(copy.deepcopy(model)), batch)
        tensors = {"loss.f64": loss.double().reshape(1)}
        for key, truth in grads64.items():
            error = (grads32[key].double() - truth).norm() / truth.norm()
            tensors |= {f"grad.{key}": truth.float().contiguous(), f"grad_error.{key}": error.reshape(1)}
        save_file(tensors, folder / name / "golden.safetensors")
        names.append(name)
    (folder / "cases.json").write_text(json.dumps(names))


def main():
    torch.set_num_threads(2)
    match sys.argv[1:]:
        case ["make", folder, seed]:
            make(folder, int(seed))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
