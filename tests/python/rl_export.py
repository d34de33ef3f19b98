"""What transformers makes of an exported policy and critic, for tests/tests/it/rlhf_replay.rs.

  rl_export.py POLICY CRITIC IDS   POLICY goes on with IDS after 51,43,52,61; CRITIC is a model with one label
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

PROMPT = [51, 43, 52, 61]


def main(policy, critic, ids):
    model, told = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    ids = json.loads(ids)
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        found = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=len(ids), eos_token_id=None
        )
    assert found[0, len(PROMPT) :].tolist() == ids, (found, ids)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    assert tokenizer.decode(tokenizer("3+4=7")["input_ids"]) == "3+4=7"
    values, told = AutoModelForSequenceClassification.from_pretrained(
        critic, dtype=torch.float32, output_loading_info=True
    )
    assert values.config.num_labels == 1 and not told["missing_keys"], told


main(*sys.argv[1:])
