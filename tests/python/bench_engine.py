"""Generation engines that `cargo xtask bench engine` measures beside Tangelo's.

  bench_engine.py gguf KIND FILE.gguf OUT.gguf    the model in f32, f16 or bf16
  bench_engine.py tokens MODEL TEXTS OUT.json     a JSON list of texts as lists of ids
  bench_engine.py ENGINE MODEL DTYPE PROMPTS NEW THREADS REPEATS    prints one JSON line at its end

ENGINE is transformers, ctranslate2, openvino or llama.cpp; MODEL a Hugging Face folder (transformers, ctranslate2) or a
GGUF file; DTYPE float32 or bfloat16, in which everything is computed (openvino reads weights as float16 and keeps its
keys and values in DTYPE, too). PROMPTS is a JSON file, a list of lists of token ids, all of one length and generated for
at once. Every sequence gets NEW tokens, greedily, whatever they are. Seconds, and seconds of processor time, of each
repetition from prompts to the last token; a first one is not counted. Of the engine's own log-probabilities none are
asked for, which is less work than Tangelo's engine does.
"""

import json
import os
import resource
import sys
import time


def write_gguf(kind, source, out):
    import gguf
    import numpy

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "llama")
    made_anew = {"general.architecture", "general.file_type", "general.quantization_version"}
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in made_anew:
            element = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], element)
    writer.add_file_type({"f32": 0, "f16": 1, "bf16": 32}[kind])
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
        if kind == "f32" or values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        elif kind == "f16":
            writer.add_tensor(tensor.name, values.astype(numpy.float16))
        else:
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, gguf.quantize(values, bf16), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokens(model, texts, out):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with open(out, "w") as file:
        json.dump([tokenizer(text, add_special_tokens=False).input_ids for text in json.loads(texts)], file)


def processor_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def transformers(model, dtype, prompts, new, threads):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    ids = torch.tensor(prompts)

    def run():
        mask = torch.ones_like(ids)
        made = network.generate(
            ids, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0
        )
        return made[:, ids.shape[1] :].tolist()

    return run


def ctranslate2(model, dtype, prompts, new, threads):
    import ctranslate2
    from transformers import AutoTokenizer

    converted = model.rstrip("/") + "-ctranslate2"
    if not os.path.exists(os.path.join(converted, "model.bin")):
        ctranslate2.converters.TransformersConverter(model).convert(converted, quantization="float32", force=True)
    generator = ctranslate2.Generator(converted, device="cpu", compute_type=dtype, intra_threads=threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in prompts]

    def run():
        made = generator.generate_batch(
            tokens, max_length=new, min_length=new, include_prompt_in_result=False, sampling_topk=1,
            max_batch_size=len(tokens),
        )
        return [result.sequences_ids[0] for result in made]

    return run


def openvino(model, dtype, prompts, new, threads):
    import numpy
    import openvino
    import openvino_genai as genai

    precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 8192
    scheduler.max_num_seqs = len(prompts)
    scheduler.cache_size = 2
    scheduler.enable_prefix_caching = False
    options = dict(
        INFERENCE_PRECISION_HINT=precision, KV_CACHE_PRECISION=precision, INFERENCE_NUM_THREADS=threads,
        scheduler_config=scheduler,
    )
    pipeline = genai.LLMPipeline(model, "CPU", **options)
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = new
    config.ignore_eos, config.do_sample = True, False
    config.apply_chat_template = False
    ids = openvino.Tensor(numpy.array(prompts, dtype=numpy.int64))
    mask = openvino.Tensor(numpy.ones((len(prompts), len(prompts[0])), dtype=numpy.int64))

    def run():
        return pipeline.generate(genai.TokenizedInputs(ids, mask), config).tokens

    return run


def llama_cpp(model, dtype, prompts, new, threads):
    import ctypes

    import llama_cpp as llama
    import numpy

    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    network = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
    count, length = len(prompts), len(prompts[0])
    params = llama.llama_context_default_params()
    params.n_ctx = count * (length + new)
    params.n_batch = params.n_ubatch = max(512, count)
    params.n_seq_max = count
    params.n_threads = params.n_threads_batch = threads
    # BF16 is 30 in ggml.h; the bindings have no name for it.
    params.type_k = params.type_v = llama.GGML_TYPE_F32 if dtype == "float32" else 30
    context = llama.llama_init_from_model(network, params)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(network))
    capacity = 512
    batch = llama.llama_batch_init(max(capacity, count), 0, 1)

    def decode(entries):
        """Computes (token, position, sequence, wanted) entries; the greedy token of the wanted ones."""
        drawn = []
        for start in range(0, len(entries), capacity):
            part = entries[start : start + capacity]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, wanted
            if llama.llama_decode(context, batch) != 0:
                raise SystemExit("llama_decode failed")
            for i, (_, _, _, wanted) in enumerate(part):
                if wanted:
                    row = numpy.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), shape=(vocabulary,))
                    drawn.append(int(row.argmax()))
        return drawn

    def run():
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        entries = [
            (token, position, sequence, position == length - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        made = [decode(entries)]
        for step in range(new - 1):
            made.append(decode([(token, length + step, i, True) for i, token in enumerate(made[-1])]))
        return [list(column) for column in zip(*made)]

    return run


ENGINES = {"transformers": transformers, "ctranslate2": ctranslate2, "openvino": openvino, "llama.cpp": llama_cpp}


def main(engine, model, dtype, prompts, new, threads, repeats):
    with open(prompts) as file:
        prompts = json.load(file)
    run = ENGINES[engine](model, dtype, prompts, int(new), int(threads))
    made = run()
    if {len(ids) for ids in made} != {int(new)}:
        raise SystemExit(f"{engine} made {sorted({len(ids) for ids in made})} tokens, asked for {new}")
    seconds, processor = [], []
    for _ in range(int(repeats)):
        start, used = time.perf_counter(), processor_seconds()
        run()
        seconds.append(time.perf_counter() - start)
        processor.append(processor_seconds() - used)
    print(json.dumps(dict(seconds=seconds, processor_seconds=processor, first=made[0][:16])))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    match sys.argv[1:]:
        case ["gguf", kind, source, out]:
            write_gguf(kind, source, out)
        case ["tokens", model, texts, out]:
            write_tokens(model, texts, out)
        case [engine, model, dtype, prompts, new, threads, repeats]:
            main(engine, model, dtype, prompts, new, threads, repeats)
        case _:
            sys.exit(__doc__)
