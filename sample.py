"""
Text from a trained model; and two pages that show how it reads.

    python sample.py
    python sample.py --start='\\begin{theorem}' --temperature=0.8
    python sample.py --start=FILE:prompt.tex
    python sample.py --start='Let $X$ be' --attention=attention.html
    python sample.py --text=paper.tex --page=paper.html
"""
import itertools
import math
import os

import gpt
from gpt import UNKNOWN, fail, generate, load, override, pick_device, quiet, write_page
import torch
import torch.nn.functional as F

# -------------------------------------------------------------------------------------------------
out_dir = 'out'  # the folder of the run
start = '\\section{'  # the text to go on from, or FILE:path of a file with it
num_samples = 1  # how many texts
max_new_tokens = 800  # tokens in each
temperature = 0.9  # above 1 wilder, below 1 closer to what is likely, 0 always the likeliest
top_k = 0  # draw from the k likeliest tokens alone, 0 from all
top_p = 0.95  # draw from the fewest tokens that have this probability together
seed = 1337  # another seed, another text
device = 'auto'  # auto, cpu, cuda, mps
attention = ''  # a page to write (.html): what each head looks at in --start, what may come next
text = ''  # a file to score, in bits per character
page = ''  # a page to write (.html): the file of --text, shaded by surprise
# -------------------------------------------------------------------------------------------------
config = override(globals(), num_samples=(1, 10_000), temperature=100, top_p=1.0)
quiet()
if page and not text:
    fail(f'--page={page} shows a text: name its file with --text=FILE')
for name in attention, page:
    if name and not name.endswith('.html'):
        fail(f'{name}: a page is a file whose name ends in .html')


def contents(setting, path):
    try:
        with open(os.path.expanduser(path), encoding='utf-8-sig', errors='replace') as file:
            return file.read()
    except (OSError, ValueError) as error:
        fail(f'--{setting}={path}: {error}')


model, tokenizer, saved = load(os.path.join(out_dir, 'ckpt.safetensors'))
device, window = pick_device(device), model.config.block_size
model.to(device).eval()
if start.startswith('FILE:'):
    start = contents('start', start[len('FILE:'):])
prompt = (tokenizer.encode(start) or tokenizer.encode('\n'))[-window:]


@torch.inference_mode()
def read(ids):
    """What the model thinks of a text (N,): the surprise in bits at each token but the first,
    (N - 1,); and after each token the five likeliest to follow, and how likely, (N, 5) each.

    A text that is longer than the window is read in windows, half of each being what came before.
    """
    rows, half = [], (window + 1) // 2
    for i in range(0, max(1, len(ids) - window + half), half):
        done = window - half if i else 0  # places that the window before has read
        log_p = model(ids[None, i:i + window])[0, done:].float().log_softmax(dim=-1).cpu()
        follow = ids[i + done + 1:i + window + 1].cpu()
        surprise = F.nll_loss(log_p[:len(follow)], follow, reduction='none') / math.log(2)
        p, likeliest = log_p.exp().topk(min(5, log_p.size(-1)))
        rows.append([surprise, likeliest, p])
    return [torch.cat(column) for column in zip(*rows)]


def rounded(x, digits):
    return torch.round(x.double(), decimals=digits).tolist()


def show(path, ids, bits, likeliest, p, **more):
    """Write the page of a text that was read."""
    likely = [[*zip(*row)] for row in zip(likeliest.tolist(), rounded(p, 4))]
    try:
        write_page(path, ids=ids.tolist(), bits=[0, *rounded(bits, 2)], likely=likely,
                   tokens=[t.decode('utf-8', 'backslashreplace') for t in tokenizer.tokens], **more)
    except OSError as error:
        fail(f'{path}: {error}')
    print(f'written {path}, {len(ids):,} tokens; open it in a browser')


if attention:
    layers = []  # of each the weights, (H, T, T)

    def watched(q, k, v, **mask):
        layers.append(rounded(gpt.attention_weights(q, k, **mask)[0], 4))
        return gpt.attention(q, k, v, **mask)

    gpt.fused_attention = watched
    ids = torch.tensor(prompt[-256:], device=device)  # what a page can show
    show(attention, ids, *read(ids), kind='attention', layers=layers,
         title=f'What the model sees in {len(ids)} tokens')

elif text:
    ids = torch.tensor(tokenizer.encode(contents('text', text)), device=device)
    counted = ids[1:].tolist()
    if not counted:
        fail(f'--text={text}: too short to be scored')
    bits, *likely = read(ids)
    characters = len(tokenizer.decode(counted))
    title = f'{text}: {bits.double().sum() / characters:.3f} bits per character'
    print(f'{title} (of {characters:,}, in {len(counted):,} tokens, '
          f'{counted.count(tokenizer.ids.get(UNKNOWN)):,} of them unknown, after the first token)')
    if page:
        some = 2**16  # what a browser can take
        show(page, ids[:some], bits[:some - 1], *(x[:some] for x in likely),
             kind='text', title=title, quiet=[], words=[])

else:
    idx = torch.tensor([prompt], device=device).expand(num_samples, -1)
    chance = torch.Generator(device).manual_seed(seed)
    columns = generate(model, idx, max_new_tokens, temperature=temperature, top_k=top_k,
                       top_p=top_p, generator=chance)
    for n, copy in enumerate(itertools.tee(columns, num_samples)):  # the first text as it comes
        print('\n' + '-' * 80 + '\n' if n else '', start, sep='', end='')
        for piece in tokenizer.stream(int(column[n]) for column in copy):
            print(piece, end='', flush=True)
    print()
