"""
Text from a trained model; and two pages that show how it reads.

    python sample.py
    python sample.py --start='\\begin{theorem}' --temperature=0.8
    python sample.py --start=FILE:prompt.tex
    python sample.py --start='Let $X$ be' --attention=attention.html
    python sample.py --text=paper.tex --page=paper.html
"""
import itertools, json, math, os
from unittest import mock

from gpt import attention as equation_1
from gpt import UNKNOWN, fail, generate, limit, load, override, pick_device, write
import torch
import torch.nn.functional as F

# -------------------------------------------------------------------------------------------------
out_dir = 'out'  # the folder of the run
start = '\\section{'  # the text to go on from, or FILE:path of a file with it
num_samples = 1  # how many texts
max_new_tokens = 800  # tokens in each
temperature = 0.8  # below 1 bolder in what is likely, 0 always the likeliest
top_k = 0  # draw from the k likeliest tokens alone, 0 from all
top_p = 0.95  # draw from the fewest tokens that have this probability together
seed = 1337  # another seed, another text
device = 'auto'  # auto, cpu, cuda, mps
attention = ''  # a page to write (.html): what each head looks at in --start, what may come next
text = ''  # a file to score, in bits per character
page = ''  # a page to write (.html): the file of --text, shaded by surprise
# -------------------------------------------------------------------------------------------------
config = override(globals())
limit(config, num_samples=(1, 10**4), max_new_tokens=(1, 10**9), temperature=(0, 100),
      top_k=(0, 2**16), top_p=(0, 1), seed=(0, 2**31))
if page and not text:
    fail(f'--page={page} shows a text: name its file with --text=FILE')
for name in filter(None, (attention, page)):
    if not name.endswith('.html'):
        fail(f'{name}: a page is a file whose name ends in .html')

def contents(setting, path):
    try:
        with open(path, encoding='utf-8-sig', errors='replace') as file:
            return file.read()
    except OSError as error:
        fail(f'--{setting}={config[setting]}: {error.strerror}')

model, tokenizer, _ = load(os.path.join(out_dir, 'ckpt.pt'))
device, window = pick_device(device), model.config.block_size
model.to(device).eval()
if start.startswith('FILE:'):
    start = contents('start', start[5:])
prompt = (tokenizer.encode(start) or tokenizer.encode('\n'))[-window:]

@torch.inference_mode()
def read(ids):
    """The surprise in bits at each of ids (N,) but the first, (N - 1,); at each, what is likeliest
    to follow, and how likely, (N, 5) twice. Half of each further window is what came before."""
    rows, half = [], (window + 1) // 2
    for i in range(0, max(1, len(ids) - window + half), half):
        done = window - half if i else 0  # places that the window before has read
        log_p = model(ids[None, i:i + window])[0, done:].float().log_softmax(dim=-1).cpu()
        follow = ids[i + done + 1:i + window + 1].cpu()
        bits = F.nll_loss(log_p[:len(follow)], follow, reduction='none') / math.log(2)
        p, likeliest = log_p.exp().topk(min(5, log_p.size(-1)))
        rows.append([bits, likeliest, p])
    return [torch.cat(column) for column in zip(*rows)]

weights, fused = [], F.scaled_dot_product_attention

def watched(q, k, v, **how):
    """torch's attention; with the identity for v, equation (1) gives the weights themselves."""
    weights.append(equation_1(q, k, torch.eye(k.size(2), device=k.device))[0])  # (H, N, N)
    return fused(q, k, v, **how)

def write_page(path, title, *reading):
    """Write the page below with its numbers, in units of 1/10000."""
    ids, bits, likeliest, p = [x[:2**16] for x in reading]  # what a browser can take
    bits, p, *layers = [(10_000 * x).round().int().tolist() for x in (bits, p, *weights)]
    data = dict(title=title, ids=ids.tolist(), bits=[0, *bits], layers=layers,
                likely=[[*zip(*row)] for row in zip(likeliest.tolist(), p)],
                tokens=[t.decode('utf-8', 'backslashreplace') for t in tokenizer.tokens])
    numbers = json.dumps(data).replace('<', r'\u003c')  # nothing in it is a tag
    try:
        write({path: PAGE.replace('DATA', numbers).encode()})
    except OSError as error:
        fail(f'{path}: {error.strerror}')
    print(f'written {path}, {len(ids):,} tokens; open it in a browser')

# -------------------------------------------------------------------------------------- the page
PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Wolfgang-GPT</title>
<meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark; scroll-padding: 5rem }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: auto; padding: 0 1rem;
  display: flex; flex-wrap: wrap; gap: 0 2rem }
main { flex: 50 1 30rem; min-width: 0 }  figure { margin: 0; max-width: 17rem; font-size: 12px }
aside { flex: 1 1 15rem; align-self: start; position: sticky; inset: 0 auto; background: Canvas }
.grid { display: grid; gap: .5rem 1em; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)) }
h1, h2 { font-size: 1rem; margin: .6rem 0 .2rem; grid-column: 1 / -1 }  h1 { font-size: 1.2rem }
#text, a, b { font: 13px/1.7 monospace; white-space: pre-wrap; overflow-wrap: anywhere }
#text span { background: rgb(235 120 30 / var(--w)); border-left: 1px solid Canvas }
#text .here { outline: 2px solid }
.bar { background: linear-gradient(rgb(235 120 30 / .5) 0 0) no-repeat 0 / var(--w);
  display: flex; justify-content: space-between; align-items: baseline; margin: 1px 0 }
canvas { width: 100%; box-sizing: border-box; image-rendering: pixelated; border: 1px solid #8888;
  background: linear-gradient(#48f8 0 0) no-repeat 0 var(--row) / 100% max(2px, var(--height)),
  linear-gradient(to top right, #0000 50%, #8883 50%) }
</style><main><h1></h1><p></p><ol></ol><div id="text"></div></main>
<aside class="grid"><h1></h1><div></div><div></div></aside><script>
const D = DATA, N = D.ids.length, heads = D.layers.flat(), lists = []
const find = q => document.querySelector(q), main = find('main')
const name = i => D.tokens[i].replaceAll('\n', '↵').replaceAll(' ', '␣')
const add = (to, tag, textContent = '', more = {}) =>
  to.appendChild(Object.assign(document.createElement(tag), {textContent, ...more}))
const spans = D.ids.map((i, t) => add(find('#text'), 'span', D.tokens[i].replaceAll('\n', '↵\n'),
  {id: 't' + t, tabIndex: 0, style: '--w:' + Math.min(D.bits[t] / 12e4, .8)}))
let held  // the place that a click holds
function bars(to, title, shares) {
  to.replaceChildren(), add(to, 'h2', title)
  for (const [i, x] of shares) {
    const percent = (x / 100).toFixed(1) + '%'
    const bar = add(to, 'div', '', {className: 'bar', style: '--w:' + percent})
    add(bar, 'b', name(i)), add(bar, 'span', percent)
  }
}
function show(t, looking) {  // place t, and where some heads look from there
  const [token, here, next] = find('aside').children
  token.textContent = name(D.ids[t]) + (t ? `: ${(D.bits[t] / 1e4).toFixed(2)} bits` : '')
  bars(here, t ? 'expected here' : 'not scored', D.likely[t - 1] ?? [])
  bars(next, 'expected next', D.likely[t])
  find('.here')?.removeAttribute('class')
  spans[t].className = 'here'
  main.style = `--row:${100 * t / (N - 1 || 1)}%; --height:${100 / N}%`
  if (looking.length) spans.forEach((span, s) => span.style = '--w:' + Math.sqrt(
    looking.reduce((sum, head) => sum + head[t][s] / 1e4, 0) / looking.length))
  heads.forEach((head, h) => bars(lists[h], `head ${h % D.layers[0].length + 1}`,
    head[t].map((x, s) => [D.ids[s], x]).sort((a, b) => b[1] - a[1]).slice(0, 3)))
}
function point({type, target, offsetY}) {  // at a token, or at a row of a picture
  const t = target.head ? Math.floor(N * offsetY / target.clientHeight) : spans.indexOf(target)
  if (!spans[t]) return
  if (type == 'click') held = t == held ? undefined : t
  show(type == 'focusin' ? t : held ?? t, target.head ? [target.head] : heads)
}
find('h1').textContent = D.title
find('p').textContent = 'Point at a token or tab to it; a click holds it. ' + (heads.length
  ? 'Colour is attention, its square root: of each head, where a row looks; here, their mean.'
  : 'Colour is surprise: -log2 p bits, where p was the probability. Most bits a token:')
D.layers.forEach((layer, l) => {
  add(main, 'h2', `layer ${l + 1}`)
  const row = add(main, 'div', '', {className: 'grid'})
  for (const head of layer) {
    const figure = add(row, 'figure')
    const paint = add(figure, 'canvas', '', {head, width: N, height: N}).getContext('2d')
    paint.fillStyle = 'rgb(235 120 30)'
    head.forEach((row, t) => row.forEach((x, s) => {
      paint.globalAlpha = Math.sqrt(x / 1e4)
      paint.fillRect(s, t, 1, 1)
    }))
    lists.push(add(figure, 'div'))
  }
})
if (!heads.length) {
  const lines = [[]], mean = line => line.reduce((sum, t) => sum + D.bits[t], 0) / line.length
  D.ids.forEach((i, t) => lines[0].push(t) && D.tokens[i].includes('\n') && lines.unshift([]))
  lines.filter(line => line.length > 7).sort((a, b) => mean(b) - mean(a)).slice(0, 10).forEach(
    line => add(add(find('ol'), 'li', (mean(line) / 1e4).toFixed(2) + ' '), 'a',
      line.map(t => D.tokens[D.ids[t]]).join('').trim(), {href: '#t' + line[0]}))
}
for (const type of ['pointermove', 'focusin', 'click']) main.addEventListener(type, point)
show(heads.length ? N - 1 : 0, heads)
</script>
"""
# ------------------------------------------------------------------------------------------------
if attention:
    ids = torch.tensor(prompt[-256:], device=device)  # what a page can show
    with mock.patch.object(F, 'scaled_dot_product_attention', watched):
        reading = read(ids)
    write_page(attention, f'What the model sees in {len(ids)} tokens', ids, *reading)
elif text:
    ids = torch.tensor(tokenizer.encode(contents('text', text)), device=device)
    counted = ids[1:].tolist()
    if not counted:
        fail(f'--text={text}: too short to be scored')
    reading, characters = read(ids), len(tokenizer.decode(counted))
    title = f'{text}: {reading[0].double().sum() / characters:.3f} bits per character'
    print(f'{title} (of {characters:,}, in {len(counted):,} tokens, '
          f'{counted.count(tokenizer.ids.get(UNKNOWN)):,} of them unknown, after the first token)')
    if page:
        write_page(page, title, ids, *reading)
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
