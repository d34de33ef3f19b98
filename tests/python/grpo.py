"""TRL's GRPO loss and its gradient on random sequences, for tests/tests/it/grpo.rs.

  grpo.py OUT SEED   OUT/model, a random small Llama; OUT/batch.safetensors, sequences and their streams, right-padded;
                     OUT/TYPE.safetensors for each loss type: the loss, its metrics and every gradient

The loss is GRPOTrainer's own method, on a trainer that was never set up: of it the method reads settings alone. Its
log-probabilities come from the model's logits directly.
"""

import random
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from golden import randomise
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOTrainer

TEMPERATURE, BETA, LOW, HIGH, DELTA, LONGEST = 0.9, 0.04, 0.2, 0.28, None, 24
ENTROPY = {"bnpo": 0.01}


def tokens_say(model, input_ids, attention_mask, logits_to_keep):
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1] / TEMPERATURE
    logprobs = logits.log_softmax(-1)[:, -logits_to_keep:]
    chosen = logprobs.gather(-1, input_ids[:, -logits_to_keep:, None]).squeeze(-1)
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


class Trainer(GRPOTrainer):
    def __init__(self, model, loss_type):
        self.model, self.loss_type, self.beta = model, loss_type, BETA
        self.epsilon_low, self.epsilon_high, self.max_completion_length = LOW, HIGH, LONGEST
        self.args = SimpleNamespace(delta=DELTA, use_bias_correction_kl=False, steps_per_generation=1)
        self.accelerator = SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        )
        self.aux_loss_enabled = self.use_vllm = self.use_adaptive_entropy = False
        self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
        self.importance_sampling_level, self.current_gradient_accumulation_steps = "token", 1
        self._entropy_bonus_enabled, self.entropy_coef = loss_type in ENTROPY, ENTROPY.get(loss_type, 0.0)
        self._metrics = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **_):
        return *tokens_say(model, input_ids, attention_mask, logits_to_keep), None


def draw(model, rng, generator):
    """Prompts padded on the left, completions on the right; old and reference policies some way off."""
    rows, longest_prompt, vocabulary = 7, 9, model.config.vocab_size
    prompt_mask, mask = torch.zeros(rows, longest_prompt), torch.zeros(rows, LONGEST)
    for row in range(rows):
        prompt_mask[row, longest_prompt - rng.randrange(1, longest_prompt + 1) :] = 1
        mask[row, : rng.randrange(1, LONGEST + 1)] = 1
    prompt = torch.randint(vocabulary, prompt_mask.shape, generator=generator)
    completion = torch.randint(vocabulary, mask.shape, generator=generator)
    batch = dict(prompt_ids=prompt, prompt_mask=prompt_mask.long(), completion_ids=completion)
    batch["completion_mask"] = mask.long()
    ids, both = torch.cat([prompt, completion], 1), torch.cat([prompt_mask, mask], 1).long()
    with torch.no_grad():
        now, _ = tokens_say(model, ids, both, LONGEST)
    batch["old_per_token_logps"] = now + 0.3 * torch.randn(now.shape, generator=generator)
    batch["ref_per_token_logps"] = now + 0.5 * torch.randn(now.shape, generator=generator)
    batch["advantages"] = torch.randn(rows, generator=generator)
    batch["num_items_in_batch"] = mask.sum()
    return batch


def main(out, seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    config = LlamaConfig(
        vocab_size=331, hidden_size=64, intermediate_size=320, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).float().train()
    randomise(model, generator)
    model.save_pretrained(out / "model")
    batch = draw(model, rng, generator)
    save_file({k: v.contiguous().float() for k, v in batch.items() if v.dim() > 0}, out / "batch.safetensors")
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        model.zero_grad()
        trainer = Trainer(model, loss_type)
        loss = trainer._compute_loss(model, batch)
        loss.backward()
        found = {f"grad.{name}": p.grad.clone() for name, p in model.named_parameters()}
        metrics = trainer._metrics["train"]
        numbers = [loss.item(), metrics["kl"][0], metrics["entropy"][0], metrics["clip_ratio/region_mean"][0]]
        save_file(found | {"numbers": torch.tensor(numbers, dtype=torch.float64)}, out / f"{loss_type}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
