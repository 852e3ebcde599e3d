"""What a user of llama-cpp-python writes to get an answer, up to its first token: `python -m ... FILE PROMPT`."""

import sys

from llama_cpp import Llama

model = Llama(sys.argv[1], verbose=False)
for piece in model.create_completion(sys.argv[2], max_tokens=8, temperature=0, stream=True):
    if piece["choices"][0]["text"]:
        print(piece["choices"][0]["text"], flush=True)
        break
