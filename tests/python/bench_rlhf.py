"""The peers that `cargo xtask bench rlhf` measures beside Tangelo; each command prints one JSON line at its end.

  bench_rlhf.py prepare FILE.gguf OUT                          the model as a Hugging Face folder in fp32
  bench_rlhf.py grpo MODEL DTYPE STEPS PROMPTS N NEW THREADS   steps of TRL's GRPOTrainer
  bench_rlhf.py ppo  MODEL DTYPE STEPS PROMPTS N NEW THREADS   steps of TRL's PPOTrainer (trl.experimental.ppo, TRL 1.12)

MODEL is a Hugging Face folder, PROMPTS a file of JSON lines {"text": ..} in the order of steps, each asked N times. All
answers have NEW tokens. Both sides compute the same: no KL in GRPO; in PPO policy, critic and reference, all of one size,
one pass over the data. The parameters are of DTYPE throughout, the fastest form there is (Tangelo keeps fp32 masters
beside bf16). PPOTrainer insists on a reward model: it gets one of a single narrow layer.
"""

import json
import os
import resource
import sys
import time

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Stopwatch:
    """Seconds in the methods of an object that it wraps, by name."""

    def __init__(self):
        self.seconds = {}

    def wrap(self, owner, method, name):
        original = getattr(owner, method)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        setattr(owner, method, timed)

    def take(self):
        seconds, self.seconds = self.seconds, {}
        return seconds


def processor_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prepare(file, out):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = os.path.split(file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # The weights are plain numbers now; without this they cannot be saved.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)


def tokenizer_of(path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def texts(path):
    with open(path) as lines:
        return [json.loads(line)["text"] for line in lines]


def grpo(path, dtype, steps, prompts, n, new, threads):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(threads)
    prompts = texts(prompts)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation="sdpa")
    per_step = len(prompts) // steps
    config = GRPOConfig(
        output_dir="/tmp/none", use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, max_steps=steps, per_device_train_batch_size=per_step * n, num_generations=n,
        max_completion_length=new, beta=0.0, learning_rate=1e-6, temperature=1.0, shuffle_dataset=False,
        gradient_checkpointing=False, generation_kwargs=dict(min_new_tokens=new), loss_type="grpo",
    )

    def reward(completions, **kwargs):
        return [float(sum(c.isdigit() for c in text)) for text in completions]

    stopwatch, log = Stopwatch(), []

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start, self.processor = time.perf_counter(), processor_seconds()

        def on_step_end(self, *args, **kwargs):
            seconds = dict(stopwatch.take())
            seconds["step"] = time.perf_counter() - self.start
            seconds["processor"] = processor_seconds() - self.processor
            log.append(seconds)

    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list([{"prompt": p} for p in prompts]),
        processing_class=tokenizer_of(path), callbacks=[Steps()],
    )
    stopwatch.wrap(trainer, "_generate_single_turn", "generate")
    stopwatch.wrap(trainer, "_generate_and_score_completions", "generate_and_score")
    trainer.train()
    for seconds in log:
        seconds["score"] = seconds.pop("generate_and_score") - seconds["generate"]
        seconds["train"] = seconds["step"] - seconds["generate"] - seconds["score"]
    print(json.dumps(dict(steps=log, peak_bytes=peak_bytes())))


def ppo(path, dtype, steps, prompts, n, new, threads):
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    from trl.experimental.ppo import ppo_trainer as module

    torch.set_num_threads(threads)
    tokenizer = tokenizer_of(path)
    prompts = texts(prompts)
    per_step = len(prompts) // steps

    def policy():
        return AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation="sdpa")

    def head():
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=DTYPES[dtype])

    narrow = AutoConfig.from_pretrained(path, num_labels=1)
    narrow.hidden_size, narrow.intermediate_size, narrow.num_hidden_layers = 16, 16, 1
    narrow.num_attention_heads, narrow.num_key_value_heads, narrow.head_dim = 1, 1, 16
    if getattr(narrow, "layer_types", None):
        narrow.layer_types = narrow.layer_types[:1]
    config = PPOConfig(
        output_dir="/tmp/none", use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=per_step * n, gradient_accumulation_steps=1, num_mini_batches=1, num_ppo_epochs=1,
        total_episodes=steps * per_step * n, local_rollout_forward_batch_size=per_step * n, response_length=new,
        temperature=1.0, learning_rate=1e-6, num_sample_generations=0, gradient_checkpointing=False,
    )
    rows = [dict(input_ids=tokenizer(p, add_special_tokens=False).input_ids) for p in prompts for _ in range(n)]
    tokenizer.padding_side = "left"
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy(), ref_model=policy(),
        reward_model=AutoModelForSequenceClassification.from_config(narrow, dtype=DTYPES[dtype]),
        value_model=head(), train_dataset=Dataset.from_list(rows),
    )
    # A step begins with generation, and training within it with the accumulation of gradients.
    stopwatch, begins, lessons = Stopwatch(), [], []
    stopwatch.wrap(module, "batch_generation", "generate")
    generate, accumulate = module.batch_generation, trainer.accelerator.accumulate

    def begin(*args, **kwargs):
        begins.append((time.perf_counter(), processor_seconds(), stopwatch.take()))
        return generate(*args, **kwargs)

    def lesson(*args, **kwargs):
        lessons.append(time.perf_counter())
        return accumulate(*args, **kwargs)

    module.batch_generation, trainer.accelerator.accumulate = begin, lesson
    trainer.train()
    begins.append((time.perf_counter(), processor_seconds(), stopwatch.take()))
    log = []
    for (start, used, _), (end, later, seconds), lesson_at in zip(begins, begins[1:], lessons, strict=False):
        took = dict(step=end - start, processor=later - used, generate=seconds["generate"], train=end - lesson_at)
        log.append(took | dict(score=took["step"] - took["generate"] - took["train"]))
    print(json.dumps(dict(steps=log, peak_bytes=peak_bytes())))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    match sys.argv[1:]:
        case ["prepare", file, out]:
            prepare(file, out)
        case ["grpo" | "ppo" as command, path, dtype, steps, prompts, n, new, threads]:
            {"grpo": grpo, "ppo": ppo}[command](path, dtype, int(steps), prompts, int(n), int(new), int(threads))
        case _:
            sys.exit(__doc__)
