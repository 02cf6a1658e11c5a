"""A peer engine in its own process and its own environment, driven line by line from the benchmark.

Run by the benchmarks with the peer's Python; imports nothing of Pellucid. Each line of standard input is a JSON
request {"op": ...}, each line of standard output the JSON reply. An engine's own chatter goes to standard error.

usage: peer.py llama.cpp FILE.gguf THREADS N_CTX LOGITS_ALL
       peer.py transformers FOLDER THREADS
"""

import json
import os
import sys
import time


class LlamaCpp:
    def __init__(self, path, threads, n_ctx, logits_all):
        from llama_cpp import Llama, __version__

        self.version = f"llama-cpp-python {__version__}"
        self.model = Llama(
            path,
            n_ctx=int(n_ctx),
            n_threads=int(threads),
            n_threads_batch=int(threads),
            n_batch=512,
            logits_all=logits_all == "1",
            verbose=False,
        )

    def prefill(self, ids):
        """Seconds to run `ids` from an empty context."""
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(ids)
        return {"seconds": time.perf_counter() - start}

    def decode(self, ids):
        """Seconds to run `ids` one by one after what ran before."""
        start = time.perf_counter()
        for token in ids:
            self.model.eval([token])
        return {"seconds": time.perf_counter() - start}

    def tokenize(self, text):
        return {"ids": self.model.tokenize(text.encode(), add_bos=True, special=False)}

    def logits(self, ids, path):
        """Write float32 [len(ids), vocab] to `path` (.npy)."""
        import numpy as np

        self.model.reset()
        self.model.eval(ids)
        np.save(path, self.model.scores[: len(ids)])
        return {}


class Transformers:
    def __init__(self, folder, threads):
        import torch
        import transformers

        torch.set_num_threads(int(threads))
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}, float32"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(self, ids, path):
        """Write float32 [len(ids), vocab] to `path` (.npy)."""
        import numpy as np
        import torch

        with torch.inference_mode():
            np.save(path, self.model(torch.tensor([ids])).logits[0].numpy())
        return {}


def main():
    # Native code prints to descriptor 1 as it likes; the replies get a descriptor of their own.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = {"llama.cpp": LlamaCpp, "transformers": Transformers}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps({"version": engine.version}), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(engine, request.pop("op"))(**request)), file=replies)


if __name__ == "__main__":
    main()
