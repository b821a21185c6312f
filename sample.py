"""
Text from a trained model, as a paper too; a proof-reader; and two pages that show how it reads.

    python sample.py
    python sample.py --start='\\begin{theorem}' --temperature=0.8
    python sample.py --start=FILE:prompt.tex
    python sample.py --tex=dream.tex
    python sample.py --start='Let $X$ be' --attention=attention.html
    python sample.py --text=paper.tex --page=paper.html
"""
import math
import os
import re
import unicodedata
from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

import gpt
from gpt import fail, generate, load, override, pick_device, quiet, write_page
import torch

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
text = ''  # a file to score, in bits per character, and to proof-read
page = ''  # a page to write (.html): the file of --text, shaded by surprise
tex = ''  # a file to write (.tex): the texts as a document that compiles
# -------------------------------------------------------------------------------------------------
config = override(globals(), num_samples=(1, 10_000), temperature=100, top_p=1.0)
quiet()
if page and not text or tex and (attention or text):
    fail('--page goes with --text=FILE; --tex goes without --text and --attention')
for name, ending in (attention, '.html'), (page, '.html'), (tex, '.tex'):
    if name and not name.endswith(ending):
        fail(f'{name}: the name of this file has to end in {ending}')


def contents(path):
    try:
        with open(os.path.expanduser(path), encoding='utf-8-sig', errors='replace') as file:
            return file.read()
    except OSError as error:
        fail(error)


model, tokenizer, saved = load(os.path.join(out_dir, 'ckpt.safetensors'))
device, window = pick_device(device), model.config.block_size
model.to(device).eval()
if start.startswith('FILE:'):
    start = contents(start[5:])
prompt = torch.tensor(tokenizer.encode(start or '\n'))[-window:]  # (T,)


@torch.inference_mode()
def read(ids):
    """What the model thinks of a text (N,): the surprise in bits at each token, (N,), with 0 for
    the first; and after each token the five likeliest to follow, each with its p, (N, 5, 2).

    The model reads half a window at a time, after the half that came before.
    """
    bits, likely, half = [torch.zeros(1)], [], (window + 1) // 2
    for at in range(0, len(ids), half):
        begin = max(0, at + half - window)
        logits = model(ids[None, begin:at + half].to(device))[0, at - begin:]
        p = logits.cpu().double().softmax(dim=-1)
        follow = ids[at + 1:at + half + 1]
        bits.append(-p[torch.arange(len(follow)), follow].log2())
        most, token = p.topk(min(5, p.size(-1)))
        likely.append(torch.stack((token, most), dim=-1))
    return torch.cat(bits), torch.cat(likely)


def show(path, ids, bits, likely, **more):
    """Write the page of a text that was read."""
    tokens = [token.decode('utf-8', 'backslashreplace') for token in tokenizer.tokens]
    try:
        write_page(path, ids=ids.tolist(), bits=bits.round(decimals=2).tolist(),
                   likely=likely.round(decimals=4).tolist(), tokens=tokens, **more)
    except OSError as error:
        fail(f'{path}: {error}')
    print(f'written {path}, {len(ids):,} tokens; open it in a browser')


# -------------------------------------------------------------------------------------------------
# The proof-reader: a slip surprises a model that knows an author's papers

HIDDEN = re.compile(r"""
    (?: \A | \\end\{document\} ) .*? \\begin\{document\}          # a preamble
  | \\end\{document\} .*                                          # what stands behind the end
  | % [^\n]*                                                      # a comment
  | \\verb ([^\w\s]) [^\n]*? \1                                   # code
  | \\begin\{ (verbatim|lstlisting) \} .*? \\end\{ \2 \}
  | (?: (?<=label) | (?<=ref) | (?<=cite) ) \{ [^{}\s]* \}        # a name
""", re.VERBOSE | re.DOTALL)
WORD = re.compile(r'\\[A-Za-z@]+|\b[^\W\d_A-Z]{2,}\b')  # control words and lower-case words

# Two braces or two dollars of one paragraph, with none in between. In a formula no word stands
# before another word, nor at the end.
PAIR = re.compile(r"""
    \{ (?: (?! \n\s*\n ) [^{}$] )* \}
  | \$ (?: (?! \n\s*\n | (?<![\\A-Za-z]) [a-z]{2,} \s+ [a-z$] ) [^{}$] )* \$
""", re.VERBOSE)


def hide(match):
    return re.sub(r'\S', '.', match.group())


def shortened(word):
    """A word, and what is left of it without one of its letters. Two words have one of these in
    common if one letter is dropped, added, or another one, or if two neighbours are exchanged."""
    return {word, *(word[:i] + word[i + 1:] for i in range(len(word)))}


def misspelt(prose, ends, bits):
    """The words that stand once and are no tokens, the likeliest slips first. Token i ends at
    ends[i] and has bits[i].

    Expected is the word a slip away that stands most often, n times in the text or as a token.
    The more often, the likelier is the slip: a word weighs its bits times log(2 + n).
    """
    tokens = b'\n'.join(tokenizer.tokens).decode(errors='replace')
    times = Counter(WORD.findall(f'{prose}\n{tokens}'))
    near = {word: shortened(word) for word in times}
    slips = []
    for match in WORD.finditer(prose):
        word, (at, end) = match.group(), match.span()
        if times[word] == 1:
            others = [other for other in near if near[other] & near[word] and other != word]
            expected = max(others, key=times.get, default='another word')
            first, last = bisect(ends, at), bisect(ends, end - 1)
            slips.append(dict(at=first, line=prose.count('\n', 0, at) + 1, word=word,
                              bits=bits[first:last + 1].sum().item(), expected=expected))
    return sorted(slips, key=lambda slip: -slip['bits'] * math.log(2 + times[slip['expected']]))


# -------------------------------------------------------------------------------------------------
# The dream: what was written, as a document that compiles

# The words that are written as they are: of mathematics, with no, one or two arguments; of text
ZERO = '''
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa varkappa
    lambda mu nu xi pi varpi rho varrho sigma varsigma tau upsilon phi varphi chi psi omega
    Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega aleph beth ell hbar imath jmath
    wp Re Im partial nabla infty emptyset varnothing forall exists nexists neg lnot top bot
    angle prime square Box blacksquare Diamond lozenge bigstar star flat sharp natural clubsuit
    complement sum prod coprod int iint iiint oint bigcup bigcap bigsqcup bigvee bigwedge
    bigoplus bigotimes biguplus arccos arcsin arctan arg cos cosh cot coth csc deg det dim exp
    gcd hom inf injlim ker lg lim liminf limsup ln log max min Pr projlim sec sin sinh sup tan
    tanh cdot times div pm mp ast circ bullet oplus ominus otimes oslash odot cup cap sqcup
    sqcap uplus vee wedge lor land setminus smallsetminus wr amalg rtimes ltimes bowtie dagger
    le leq leqslant ge geq geqslant ll gg lesssim gtrsim lessdot gtrdot prec preceq succ succeq
    equiv sim simeq approx approxeq cong asymp doteq propto ne neq not in ni notin owns mid
    nmid parallel perp subset supset subseteq supseteq subsetneq supsetneq nsubseteq sqsubset
    sqsubseteq sqsupseteq vdash dashv models vDash Vdash nvdash nvDash lhd rhd trianglelefteq
    to gets mapsto longmapsto leftarrow rightarrow leftrightarrow Leftarrow Rightarrow
    Leftrightarrow longleftarrow longrightarrow longleftrightarrow Longleftarrow Longrightarrow
    Longleftrightarrow iff implies impliedby hookrightarrow hookleftarrow twoheadrightarrow
    rightarrowtail leadsto rightsquigarrow rightharpoonup rightleftharpoons rightrightarrows
    leftleftarrows uparrow downarrow updownarrow nearrow searrow nwarrow swarrow upharpoonright
    langle rangle lvert rvert lVert rVert vert Vert lfloor rfloor lceil rceil lbrace rbrace
    cdots vdots ddots dotsb dotsc dotsm dotsi colon therefore because surd bmod triangle quad
    qquad ldots dots S
'''.split()
ONE = '''
    hat widehat tilde widetilde bar vec dot ddot check breve acute grave mathring overline
    underline overbrace underbrace sqrt mathbb mathbf mathcal mathfrak mathit mathrm mathsf
    mathtt mathop mathrel mathbin boldsymbol operatorname pmod substack xrightarrow xleftarrow
'''.split()
TWO = 'frac dfrac tfrac cfrac binom tbinom dbinom overset underset stackrel'.split()
TEXT = 'text mbox emph textbf textit texttt textsf textsc textrm textup cite ref eqref'.split()
WORDS = {**dict.fromkeys(ZERO, 0), **dict.fromkeys(ONE, 1), **dict.fromkeys(TWO, 2)}
SILENT = """
    big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr limits nolimits displaystyle
    noindent smallskip medskip bigskip newpage maketitle title author date centering bf it rm em
    nonumber notag tag qedhere hline footnote begin end item left right middle label
""".split()
TABLES = '[pbvV]?matrix|smallmatrix|aligned|cases'
KNOWN = rf'{TABLES}|equation|align\*|itemize|enumerate|proof|quote|center'
LETTERS = 'àáâãäåæçèéêëìíîïñòóôõöøùúûüýÿœćčďěłńňőřśšűůźżž'
LETTERS += LETTERS.upper() + '‘’“”–—'  # those outside ASCII that every LaTeX has
DEEP, LONG = 12, 2000  # how much is open at a time, and for how many tokens, at most
LISTS = '\\end{itemize}', '\\end{enumerate}'
PARAGRAPH = '\n\\par\n'
BETWEEN = ['blank', 'heading', 'block', 'item', 'display']  # kinds of tokens that end a paragraph
FORMULA = ['script', 'table', 'left']  # kinds that stand in mathematics

PREAMBLE = r"""\documentclass{amsart}
\usepackage[utf8]{inputenc}
\usepackage{amssymb}
\allowdisplaybreaks
\renewenvironment{cases}{\left\{\begin{array}{*{10}l}}{\end{array}\right.}
\def\mathaccentV#1#2#3#4{\mathaccent"#2#3#4 }
\let\boldsymbol\mathbf
\renewcommand\addcontentsline[3]{}
\renewcommand\ref[1]{\textsf{#1}}
\renewcommand\eqref[1]{(\textsf{#1})}
\renewcommand\cite[1]{[\textsf{#1}]}
\newtheorem{my}{}[section]
\title{A dream}
\author{Wolfgang-GPT}
\date{\today}"""

ONES = '|'.join(ONE)
SPELLINGS = {  # what can be written in several ways, and the way in which it is read below
    r'\\end\{document\}(?s:.*)|\\begin\{document\}|\\label\{[^{}]*\}': ' ',
    r'(?<!\\)\\(?=\s)': ' ',
    r'(?<!\\)\\[()]': '$',
    r'\$\$([^$]*)\$\$': r'\\[\1\\]',
    r'\\par(?![A-Za-z])': '\n\n',
    r'\s*\n\s*\n\s*': '\n\n',
    r'(begin|end)\{(?:equation\*|displaymath)\}': r'\1{equation}',
    r'(begin|end)\{(?:align|gather|multline|eqnarray|flalign)\*?\}': r'\1{align*}',
    r'\\begin\{align\*\}': r'\g<0>\\,',  # amsmath divides by the width
    r'(begin|end)\{(?:split|gathered)\}': r'\1{aligned}',
    r'(begin|end)\{array\}(\{[^{}]*\})?': r'\1{matrix}',
    r'(begin|end)\{description\}': r'\1{itemize}',
    r'(begin\{(?:itemize|enumerate)\})(\s*\[[^][]*\])?(\s*\\item(?![A-Za-z]))?': r'\1\\item ',
    rf'(begin|end)\{{(?!({KNOWN})\}})([A-Za-z]+)\*?\}}': r'\1{my\3}',
    r'frac\s*(\d)\s*(\d)': r'frac{\1}{\2}',
    rf'((?:[_^]|\\(?:{ONES})(?![A-Za-z])))\s*([A-Za-z0-9*]|#\d)': r'\1{\2}',
    rf'((?:[_^]|\\(?:{ONES})(?![A-Za-z])))\s*(\\[A-Za-z]+(\{{[^{{}}]*\}})?)': r'\1{\2}',
}
FENCE = r'''(?: [][()/|.<>] | \\[{}|] | \\[lr](?:angle|floor|ceil|vert|Vert)(?![A-Za-z]) )'''
MACRO = re.compile(r"""(?xs)
    \\(?:(?:re)?newcommand|(?P<operator>DeclareMathOperator))\*? \s*
    \{?\\(?P<name>[A-Za-z]+)\}? \s* (?:\[(?P<n>[12])\])? \s* \{(?P<body>.*)\} \s*
""")
TOKEN = re.compile(rf"""(?xs)
    (?P<blank>    \n\n )
  | (?P<space>    [\s~]+ )
  | (?P<display>  \\\[ | \\begin\{{(?:equation|align\*)\}} )
  | (?P<table>    \\begin\{{(?:{TABLES})\}} )
  | (?P<block>    \\begin\{{(?P<begun>[A-Za-z]{{1,40}})\}} (?:\[[A-Za-z0-9 .,:()-]*\])? )
  | (?P<end>      \\end\{{[A-Za-z]+\*?\}} | \\\] | \}} )
  | (?P<heading>  \\(?:part|(?:sub)*section|paragraph)(?![A-Za-z])\*? )
  | (?P<item>     \\item(?![A-Za-z]) (?:\s*\[[A-Za-z0-9 .,:()-]*\])? )
  | (?P<left>     \\left(?![A-Za-z]) \s* {FENCE} )
  | (?P<right>    \\right(?![A-Za-z]) \s* {FENCE} )
  | (?P<row>      \\\\ (?:\*?\s*\[[^][{{}}]*\])? )
  | (?P<symbol>   \\[{{}}%#&_$,;:!] )
  | (?P<letter>   [{LETTERS}] | \\['`^"~=.](?:[A-Za-z]|\{{[A-Za-z]\}}) )
  | (?P<word>     \\(?P<name>[A-Za-z]{{1,40}}) )
  | (?P<script>   [_^] )
  | (?P<prose>    [A-Za-z]{{3,40}} [ \n] [a-z]{{2,40}} )
  | (?P<prime>    '+ )
  | (?P<other>    [A-Za-z0-9]{{1,40}} | . )
""")


@dataclass
class Open:
    """What is open: the document, a list, a formula, a brace, an argument that is yet to come."""
    closer: str  # what ends it; {} is the argument
    math: bool = False  # whether mathematics stands in it, or text
    once: bool = False  # whether it ends by itself after one thing
    table: bool = False  # whether & and \\ may stand in it,
    cells: int = 0  # and how many & this row has
    scripts: str = '^_'  # those that can't come next: two of a kind are an error


def mend(text, macros):
    """LaTeX that compiles, as near to a text as it gets.

    What is open is closed where its surroundings end; what closes nothing goes. An argument that
    is missing is empty. Mathematics in a text brings its own dollars, and text in mathematics its
    own \\text. A word that isn't known to be harmless, or the author's, shows its name.
    """
    words = {**WORDS, **macros}
    text = re.sub(f'[^ -~\\n\\t{LETTERS}]', '?', unicodedata.normalize('NFKC', text))
    for ways, way in SPELLINGS.items():
        text = re.sub(ways, way, text)
    out, opened = [], [Open('\\end{document}')]

    def push(written, closer, math=False, once=False, table=False):
        out.append(written)
        opened.append(Open(closer, math, once, table))

    def close(place):
        while len(opened) > place:
            out.append(opened.pop().closer)

    def last(*closers):
        """The place of the innermost that ends so; beyond all if there is none."""
        return max((i for i, thing in enumerate(opened) if thing.closer in closers),
                   default=len(opened))

    def end_paragraph():
        while opened[-1].math or not opened[-1].closer.startswith('\\end'):
            close(len(opened) - 1)
        out.append('\n')

    for n, token in enumerate(TOKEN.finditer(text), 1):
        kind, written, name = token.lastgroup, token[0], token['name']
        no_argument = kind != 'space' and written != '{'
        while opened[-1].once or opened[-1].closer == '{}' and no_argument:
            close(len(opened) - 1)
        lost = kind == 'prose' and opened[-1].math  # most likely a dollar is missing
        if kind in BETWEEN or lost or len(opened) > DEEP or n % LONG == 0:
            end_paragraph()
        if (kind in FORMULA or name in words) and not opened[-1].math:
            push('$', '$', True, once=True)
        if (kind == 'letter' or name in TEXT) and opened[-1].math:
            push('\\text{', '}', once=True)
        top, size = opened[-1], len(out)
        scripts, top.scripts = top.scripts, ''

        if kind == 'blank':
            out.append(PARAGRAPH)
        elif kind == 'space':
            out.append('\n' if '\n' in written else ' ')
        elif kind == 'heading':
            close(1)
            push(PARAGRAPH + written, '{}')
        elif kind == 'block':
            if len(opened) > 4:
                close(1)
            push(written + '{}', f'\\end{{{token["begun"]}}}')
        elif kind == 'item':
            close(last(*LISTS) + 1)
            if opened[-1].closer in LISTS:
                out.append(written + '{}')

        elif written == '\\[':
            push(written, '\\]', True)
        elif kind == 'display':
            push(written, written.replace('begin', 'end'), True, table='align' in written)
        elif kind == 'table':
            push(written + '{}', written.replace('begin', 'end'), True, table=True)
        elif kind == 'left':
            push(written + ' ', '\\right.', True)
        elif kind == 'right':
            close(last('\\right.') + 1)
            if opened[-1].closer == '\\right.':
                opened[-1].closer = written + ' '
                close(len(opened) - 1)
        elif kind == 'end' or written == '$' and top.math:
            close(last(written))
        elif written == '$':
            push('$', '$', True)
        elif written == '{' and top.closer == '{}':  # the argument begins
            top.closer = '}'
            out.append('{')
        elif written == '{':
            push('{', '}', top.math)

        elif kind == 'script':
            if written in scripts:
                out.append('{}')
                scripts = ''
            top.scripts = scripts + written
            push(written, '{}', True)
        elif kind == 'prime' and top.math:
            out.append('{}' + written)
            top.scripts = '^'
        elif kind == 'row':
            out.append('\\\\{}\n' if top.table else ' ')
            top.cells = 0
        elif written == '&' and top.table and top.cells < 9:
            out.append('&')
            top.cells += 1
        elif name in TEXT:
            push(written, '{}')
        elif name in words:
            if name in macros:
                written, top.scripts = f'\\my{name}', '^_'
            out.append(written + ' ')
            for _ in range(words[name]):
                push('', '{}', True)
        elif kind == 'word':
            out.append('' if name in SILENT else f'\\textsf{{{name}}}')
        elif written in '&#%':
            out.append('\\' + written)
        elif written != '\\':
            out.append(written)
        if not ''.join(out[size:]).strip():  # nothing came
            top.scripts = scripts
    close(1)
    text = re.sub(r'(\\[A-Za-z]+) (?![A-Za-z])', r'\1', ''.join(out))
    text = re.sub(r'\$(?=\$)', '$ ', text)  # $$ would be a display
    return re.sub(r'\n\s+', '\n', text).replace(PARAGRAPH[1:], '\n')  # no blank lines but these


def document(texts):
    """A paper of these texts; before them the author's macros of mathematics, mended, under names
    that are not LaTeX's. A macro may use those before it that use none."""
    macros, plain, lines = {}, {}, [PREAMBLE]
    for match in filter(None, map(MACRO.fullmatch, saved.get('macros', []))):
        name, n, body = match['name'], match['n'] or '0', match['body']
        if match['operator']:
            body = f'\\operatorname{{{body}}}'
        body = mend(f'${body}$', plain).replace('\\#', '#')
        wrong = re.search(rf'\\({"|".join(TEXT)})\{{[^}}]*#|.\$.|\n|#[^{"12"[:int(n)]}\n]', body)
        if not wrong and name not in macros:
            macros[name] = int(n)
            if '\\my' not in body:
                plain[name] = int(n)
            lines.append(f'\\newcommand\\my{name}[{n}]{{{body.strip("$")}}}')
    for i, text in enumerate(texts):
        if len(texts) > 1 and not text.startswith('\\section'):
            text = f'\\section{{Text {i + 1}}}\n{text}'
        texts[i] = mend(text, macros)
    body = '\n\n'.join(texts)
    for name in sorted(set(re.findall(r'\\begin\{my(.*?)\}', body))):
        lines.append(f'\\newtheorem{{my{name}}}[my]{{{name.capitalize()}}}')
    return '\n'.join([*lines, '\\begin{document}', '\\maketitle', body, '\\end{document}', ''])


# -------------------------------------------------------------------------------------------------
# What was asked for

if attention:
    ids = prompt[-256:]  # what a page can show
    bits, likely = read(ids)
    layers = []  # of each the weights, (H, T, T)

    def watched(q, k, v, is_causal):
        weights = gpt.attention_weights(q, k, is_causal)[0].double()
        layers.append(weights.round(decimals=4).tolist())
        return gpt.attention(q, k, v, is_causal)

    gpt.fused_attention = watched
    model(ids[None].to(device))
    show(attention, ids, bits, likely, kind='attention', layers=layers,
         title=f'What the model sees in {len(ids)} tokens')

elif text:
    content = contents(text)
    ids = torch.tensor(tokenizer.encode(content))
    if len(ids) < 2:
        fail(f'--text={text}: too short to be scored')
    bits, likely = read(ids)
    bpe = tokenizer.kind == 'bpe'
    units = tokenizer.stream(ids.tolist()) if bpe else tokenizer.split(content)
    ends = [*accumulate(map(len, units))]  # where each token ends in the text
    title = f'{text}: {bits.sum() / (len(content) - ends[0]):.3f} bits per character'
    print(f'{title} (of {len(content):,}, in {len(ids):,} tokens)')

    plain = re.sub(r'\\[^\sA-Za-z@]', '..', content)  # without \{ and the like
    prose = HIDDEN.sub(hide, plain)
    words = misspelt(prose, ends, bits)[:100]
    for slip in words[:20]:
        print('line {line}: {word}, {bits:.0f} bits; expected {expected}'.format(**slip))
    while PAIR.search(prose):
        prose = PAIR.sub(hide, prose)
    for number, line in enumerate(prose.split('\n'), 1):
        if signs := re.findall('[{}$]', line):
            print(f'line {number}: {" ".join(signs)} without a partner')
    if page:
        hidden = [[bisect(ends, at) for at in match.span()] for match in HIDDEN.finditer(plain)]
        show(page, ids, bits, likely, kind='text', title=title, quiet=hidden, words=words)

else:
    chance = torch.Generator(device).manual_seed(seed)
    texts = [start] * num_samples
    for n in range(num_samples):
        if n:
            print('-' * 80)
        print(start, end='')
        tokens = generate(model, prompt[None].to(device), max_new_tokens, temperature=temperature,
                          top_k=top_k, top_p=top_p, generator=chance)
        for piece in tokenizer.stream(map(int, tokens)):  # as it comes
            print(piece, end='', flush=True)
            texts[n] += piece
        print()
    if tex:
        try:
            gpt.write(tex, document(texts).encode())
        except OSError as error:
            fail(f'{tex}: {error}')
        print(f'written {tex}; to see it: pdflatex -interaction=nonstopmode {tex}, or Overleaf')
