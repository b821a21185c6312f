"""
Text from a trained model.

    python sample.py
    python sample.py --start='\\begin{theorem}' --temperature=0.8
    python sample.py --start=FILE:prompt.tex
"""
import os
import sys

from gpt import fail, generate, limit, load, override, pick_device
import torch

# -------------------------------------------------------------------------------------------------
out_dir = 'out'  # the folder of the run
start = '\n'  # the text to go on from, or FILE:path of a file with it
num_samples = 1  # how many texts
max_new_tokens = 800  # tokens in each
temperature = 0.8  # below 1 bolder in what is likely, 0 always the likeliest
top_k = 0  # draw from the k likeliest tokens alone, 0 from all
top_p = 0.95  # draw from the fewest tokens that have this probability together
seed = 1337  # another seed, another text
device = 'auto'  # auto, cpu, cuda, mps
# -------------------------------------------------------------------------------------------------
config = override(globals())
limit(config, num_samples=(1, 10**4), max_new_tokens=(1, 10**9), temperature=(0, 100),
      top_k=(0, 2**16), top_p=(0, 1), seed=(0, 2**31))

model, tokenizer, _ = load(os.path.join(out_dir, 'ckpt.pt'))
device = pick_device(device)
model.to(device).eval()
if start.startswith('FILE:'):
    try:
        with open(start[5:], encoding='utf-8', errors='replace') as file:
            start = file.read()
    except OSError as error:
        fail(f'--start={start}: {error.strerror}')

prompt = tokenizer.encode(start) or tokenizer.encode('\n')
idx = torch.tensor([prompt] * num_samples, device=device)
chance = torch.Generator(device).manual_seed(seed)
others = [[] for _ in range(1, num_samples)]

def first(columns):
    """The first text, as it comes; the others are kept for later."""
    for column in columns:
        one, *more = column.tolist()
        for other, i in zip(others, more):
            other.append(i)
        yield one

print(start, end='')
for text in tokenizer.stream(first(generate(model, idx, max_new_tokens, generator=chance, temperature=temperature,
                                            top_k=top_k, top_p=top_p))):
    print(text, end='', flush=True)
for other in others:
    print('\n' + '-' * 80 + '\n' + start + tokenizer.decode(other), end='')
print()
