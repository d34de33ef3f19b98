"""Runs one reward function for Tangelo: calls come as JSON lines on stdin, answers leave as JSON lines on stdout.

Started as `python3 -c THIS FILE FUNCTION ARGUMENTS`; needs the standard library only. The function is called as verl
calls it: compute_score(data_source=..., solution_str=..., ground_truth=..., extra_info=..., **ARGUMENTS). A plain
function runs on the main thread, one call after the other, so that it may use signals; an async one runs all its calls
together. What it prints goes to stderr. When stdin ends, the process ends at once, whatever the function is doing.
"""

import asyncio
import importlib.util
import inspect
import json
import os
import queue
import sys
import threading
import traceback


def take_pipes():
    """The pipes of calls and answers, out of reach of the function: what it prints must not look like an answer."""
    calls = os.fdopen(os.dup(0), "r", encoding="utf-8", newline="\n")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return calls, answers


def load(path, name):
    """The function of that name in the file, imported as a module of its own."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    sys.argv = [path]
    spec = importlib.util.spec_from_file_location("tangelo_reward_function", path)
    if spec is None:
        sys.exit(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == spec.name]
        sys.exit(f"{path} defines no function `{name}`; functions there are: {', '.join(names) or 'none'}")
    return function


def number(value):
    """A float that JSON can carry."""
    value = float(value)
    return value if value - value == 0 else str(value)


def answer_of(result):
    """What verl accepts as a score: a number, a dict with a score, or a sequence that starts with one."""
    if isinstance(result, dict):
        if "score" not in result:
            raise KeyError(f"the dict that was returned has no \"score\"; its keys are {list(result)}")
        parts = {}
        for key, value in result.items():
            if key != "score":
                try:
                    parts[str(key)] = number(value)
                except (TypeError, ValueError):
                    pass  # A text such as the answer that was found: no value of a metric.
        return {"score": number(result["score"]), "parts": parts}
    if isinstance(result, (list, tuple)):
        result = result[0]
    return {"score": number(result)}


def describe(error, path):
    """The error and the last line of the user's file that it passed through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    place = f" ({os.path.basename(path)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def main():
    path, name, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    calls, answers = take_pipes()
    function = load(path, name)
    lock = threading.Lock()

    def tell(message):
        with lock:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    def keywords(call):
        return {key: call[key] for key in ("data_source", "solution_str", "ground_truth", "extra_info")} | arguments

    def failed(call, error):
        tell({"id": call["id"], "error": describe(error, path)})

    def read_into(put):
        for line in calls:
            put(json.loads(line))
        # The driver is gone or wants no more.
        os._exit(0)

    def reader(put):
        threading.Thread(target=read_into, args=(put,), daemon=True).start()
        tell({"ready": True})

    def run_plain():
        waiting = queue.SimpleQueue()
        reader(waiting.put)
        while True:
            call = waiting.get()
            try:
                tell({"id": call["id"], **answer_of(function(**keywords(call)))})
            except (Exception, SystemExit) as error:
                failed(call, error)

    async def one(call):
        try:
            tell({"id": call["id"], **answer_of(await function(**keywords(call)))})
        except (Exception, SystemExit) as error:
            failed(call, error)

    async def run_async():
        loop, tasks = asyncio.get_running_loop(), set()

        def begin(call):
            task = loop.create_task(one(call))
            tasks.add(task)  # The loop itself holds tasks weakly.
            task.add_done_callback(tasks.discard)

        reader(lambda call: loop.call_soon_threadsafe(begin, call))
        await asyncio.Event().wait()

    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):
        asyncio.run(run_async())
    else:
        run_plain()


main()
