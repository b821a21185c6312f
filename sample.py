"""
Text from a trained model, as a paper too; a proof-reader; and two pages that show how it reads.

    python sample.py
    python sample.py --start='\\begin{theorem}' --temperature=0.8
    python sample.py --start=FILE:prompt.tex
    python sample.py --tex=dream.tex
    python sample.py --start='Let $X$ be' --attention=attention.html
    python sample.py --text=paper.tex --page=paper.html
"""
import itertools
import math
import os
import re
from bisect import bisect
from collections import Counter

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
text = ''  # a file to score, in bits per character, and to proof-read
page = ''  # a page to write (.html): the file of --text, shaded by surprise
tex = ''  # a file to write (.tex): the texts as a document that compiles
# -------------------------------------------------------------------------------------------------
config = override(globals(), num_samples=(1, 10_000), temperature=100, top_p=1.0)
quiet()
if page and not text:
    fail(f'--page={page} shows a text: name its file with --text=FILE')
if tex and (attention or text):
    fail(f'--tex={tex} is for what the model writes: leave out --attention and --text')
for name, ending in (attention, '.html'), (page, '.html'), (tex, '.tex'):
    if name and not name.endswith(ending):
        fail(f'{name}: the name of this file has to end in {ending}')


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
    likely = [[*zip(likeliest, p)] for likeliest, p in zip(likeliest.tolist(), rounded(p, 4))]
    tokens = [token.decode('utf-8', 'backslashreplace') for token in tokenizer.tokens]
    try:
        write_page(path, ids=ids.tolist(), bits=[0, *rounded(bits, 2)], likely=likely,
                   tokens=tokens, **more)
    except OSError as error:
        fail(f'{path}: {error}')
    print(f'written {path}, {len(ids):,} tokens; open it in a browser')


# -------------------------------------------------------------------------------------------------
# The proof-reader: what surprises a model that knows an author's papers may be a slip

HIDDEN = re.compile(r"""
    (?: \A | \\end\{document\} ) .*? \\begin\{document\}       # a preamble
  | \\end\{document\} .*                                       # what stands behind the end
  | (?<!\\) % [^\n]*                                           # a comment
  | (?: (?<=label) | (?<=ref) | (?<=cite) ) \{ [^{}\s]* \}     # a name
""", re.VERBOSE | re.DOTALL)
WORD = re.compile(r'(?<!\\)\\[A-Za-z@]+|\b[^\W\d_A-Z]{2,}\b')  # control words, lower-case words
PASSAGE = re.compile(r'\S.*?(?=\n\s*\n|\Z)', re.DOTALL)


def line(at):
    return content.count('\n', 0, at) + 1


def saving(at, end, better):
    """How many bits fewer the model needs where `better` stands in place of content[at:end]."""
    bits = []
    for middle in content[at:end], better:
        near = content[max(0, at - 200):at] + middle + content[end:end + 80]
        ids = torch.tensor(tokenizer.encode(near), device=device)
        surprise, *_ = read(ids)
        bits.append(surprise.sum().item())
    return bits[0] - bits[1]


def shortened(word):
    """A word, and what is left of it without one of its letters. Two words have one of these in
    common if one letter is dropped, added, or another one, or if two neighbours are exchanged."""
    return {word, *(word[:i] + word[i + 1:] for i in range(len(word)))}


def misspelt(bits):
    """The words that stand once, the likeliest slips first; token i has bits[i].

    A word counts as much as half of its bits, and the bits that it would save if it were another
    one that is a slip away: one of the text's, or a token.
    """
    times = Counter(WORD.findall(prose))
    tokens = b'\n'.join(tokenizer.tokens).decode(errors='replace')
    known = {*times, *WORD.findall(tokens)}
    near = {word: shortened(word) for word in known}
    slips = []
    for match in WORD.finditer(prose):
        word, at, end = match.group(), match.start(), match.end()
        if times[word] > 1:
            continue
        first, last = bisect(ends, at), bisect(ends, end - 1)
        needed = sum(bits[first:last + 1])
        others = [other for other in known - {word} if near[other] & near[word]]
        gains = [(saving(at, end, other), other) for other in others]
        gain, expected = max([(0, ''), *gains])
        slips.append(dict(at=first, line=line(at), word=word, bits=needed, expected=expected,
                          weight=gain + needed / 2))
    return sorted(slips, key=lambda slip: -slip['weight'])


def unpaired():
    """The brace or dollar that a paragraph lacks, where it saves most bits: (at, sign) each."""
    for match in PASSAGE.finditer(prose):
        signs = Counter(re.findall(r'(?<!\\)[{}$]', match.group()))
        start, end = match.span()
        places = start, *ends[bisect(ends, start):bisect(ends, end)]
        if signs['{'] > signs['}']:
            yield max(places, key=lambda at: saving(at, at, '}')), '}'
        if signs['$'] % 2:
            yield max(places, key=lambda at: saving(at, at, '$')), '$'


# -------------------------------------------------------------------------------------------------
# The dream: what was written, as a document that compiles

# The words that are written as they are: of mathematics, and those with one or two arguments
SIGNS = '''(?x:
    alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|
    varkappa|lambda|mu|nu|xi|pi|varpi|rho|varrho|sigma|varsigma|tau|upsilon|phi|
    varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega|
    aleph|beth|ell|hbar|imath|jmath|wp|Re|Im|partial|nabla|infty|emptyset|varnothing|
    forall|exists|nexists|neg|lnot|top|bot|angle|prime|square|Box|blacksquare|Diamond|
    lozenge|bigstar|star|flat|sharp|natural|clubsuit|complement|sum|prod|coprod|int|
    iint|iiint|oint|bigcup|bigcap|bigsqcup|bigvee|bigwedge|bigoplus|bigotimes|biguplus|
    arccos|arcsin|arctan|arg|cos|cosh|cot|coth|csc|deg|det|dim|exp|gcd|hom|inf|
    injlim|ker|lg|lim|liminf|limsup|ln|log|max|min|Pr|projlim|sec|sin|sinh|sup|
    tan|tanh|cdot|times|div|pm|mp|ast|circ|bullet|oplus|ominus|otimes|oslash|odot|
    cup|cap|sqcup|sqcap|uplus|vee|wedge|lor|land|setminus|smallsetminus|wr|amalg|
    rtimes|ltimes|bowtie|dagger|le|leq|leqslant|ge|geq|geqslant|ll|gg|lesssim|gtrsim|
    lessdot|gtrdot|prec|preceq|succ|succeq|equiv|sim|simeq|approx|approxeq|cong|asymp|
    doteq|propto|ne|neq|not|in|ni|notin|owns|mid|nmid|parallel|perp|subset|supset|
    subseteq|supseteq|subsetneq|supsetneq|nsubseteq|sqsubset|sqsubseteq|sqsupseteq|vdash|
    dashv|models|vDash|Vdash|nvdash|nvDash|lhd|rhd|trianglelefteq|to|gets|mapsto|
    longmapsto|leftarrow|rightarrow|leftrightarrow|Leftarrow|Rightarrow|Leftrightarrow|
    longleftarrow|longrightarrow|longleftrightarrow|Longleftarrow|Longrightarrow|
    Longleftrightarrow|iff|implies|impliedby|hookrightarrow|hookleftarrow|twoheadrightarrow|
    rightarrowtail|leadsto|rightsquigarrow|rightharpoonup|rightleftharpoons|rightrightarrows|
    leftleftarrows|uparrow|downarrow|updownarrow|nearrow|searrow|nwarrow|swarrow|
    upharpoonright|langle|rangle|lvert|rvert|lVert|rVert|vert|Vert|lfloor|rfloor|lceil|
    rceil|lbrace|rbrace|cdots|vdots|ddots|dotsb|dotsc|dotsm|dotsi|colon|therefore|
    because|surd|bmod|triangle)'''
OVER = '''(?x:
    hat|widehat|tilde|widetilde|bar|vec|dot|ddot|check|breve|acute|grave|mathring|
    overline|underline|overbrace|underbrace|sqrt|mathbb|mathbf|mathcal|mathfrak|mathit|
    mathrm|mathsf|mathtt|mathop|mathrel|mathbin|boldsymbol|operatorname|pmod|substack|
    xrightarrow|xleftarrow)'''
FRACTIONS = '''(?x:
    frac|dfrac|tfrac|cfrac|binom|tbinom|dbinom|overset|underset|stackrel)'''
TEXT = 'text|textbf|textit|texttt|textsf|textsc|textrm|textup|emph|mbox|(?:sub)*section'
KEPT = 'quad|qquad|ldots|dots|S|ref|eqref|cite|begin|end|item'
SILENT = '''(?x:left|right|[bB]igg?[lrm]?|limits|nolimits|displaystyle|nonumber|notag|noindent|
    smallskip|medskip|bigskip|newpage|maketitle|title|author|date|bf|it|rm|em|sl|centering|
    qedhere|hline|footnote)'''
TABLES = '[pbvV]?matrix|smallmatrix|aligned|cases'
BLOCKS = 'itemize|enumerate|proof|quote|center|called'
LETTERS = 'àáâãäåæçèéêëìíîïñòóôõöøùúûüýÿœÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝŒćčďěłńňőřśšűůźżž‘’“”–—'
END = '(?![A-Za-z])'  # of a word
GROUP = r'\{[^{}]*\}'
INNER = r'(?:[^{}$\\\n]|\\(?!begin|end|item|[{}]))'
NESTED = rf'(?:{INNER}|\{{(?:{INNER}|\{{{INNER}*\}})*\}})'
ARGUMENT = rf'\{{(?:{NESTED})*\}}'  # braces in it

# What can be written in several ways => how it is read below. An unknown word becomes its name,
# an argument gets its braces. At the end what TeX can't take: two scripts of a kind in a row, a
# title of a page, and a hundred errors in a paragraph, which is why a long one becomes two.
SPELLINGS = rf"""
    \s?\\(?:begin|end)\{{document\}} | \s?\\label{GROUP} | \s?\\{SILENT}{END}\.?  =>  \t
    \\par{END}                               =>  \n\n
    \\[()]                                   =>  $
    \\\\ (?: \s* \[[^][]*\] )?               =>  \\\\{{}}
    \\sqrt \s* \[[^][]*\]                    =>  \\sqrt
    (?s) \$\$ (.*?) \$\$                     =>  \\[\1\\]
    (begin|end)\{{(?:displaymath|align|gather|multline|eqnarray|flalign)\*?\}}
                                             =>  \1{{equation*}}
    (?<!\\) \\\[                             =>  \\begin{{equation*}}
    (?<!\\) \\\]                             =>  \\end{{equation*}}
    \\begin\{{equation\*?\}}                 =>  \g<0>\\begin{{aligned}}
    (begin|end)\{{(?:split|gathered)\}}      =>  \1{{aligned}}
    (begin|end)\{{array\}} ({GROUP})?        =>  \1{{matrix}}
    (begin|end)\{{ (?! (?:equation\*?|{TABLES}|{BLOCKS})\}} ) ([A-Za-z]+)\*? \}}
                                             =>  \1{{called}}{{\2}}
    end\{{called\}} {GROUP}                  =>  end{{called}}
    (begin\{{called\}}{GROUP} | \\item{END} | begin\{{[a-z*]+\}}(?<!called\}}))
    (\[[A-Za-z0-9\ .,:()-]*\])?              =>  \1\2{{}}
    (begin\{{(?:itemize|enumerate)\}})
    (?: \{{\}} | \[[^][]*\] )* (?: \s* \\item{END} (?:\{{\}})? )?
                                             =>  \1\\item{{}}
    \\ (?! (?:{SIGNS}|{OVER}|{FRACTIONS}|{TEXT}|{KEPT}){END} ) ([A-Za-z]+)
                                             =>  \\textsf{{\1}}
    ([_^] | \\(?:{OVER}|{FRACTIONS}){END}) \s* ([A-Za-z0-9*] | \\[A-Za-z]+(?:{GROUP})?)
                                             =>  \1{{\2}}
    (\\(?:{FRACTIONS})\s*{ARGUMENT}) \s* ([A-Za-z0-9])
                                             =>  \1{{\2}}
    ([_^]) ({GROUP} (?: (?!\1)[_^]{GROUP} )?) (?= \s*\1 )
                                             =>  \1\2{{}}
    (section\*?\{{ [^{{}}]{{300}})           =>  \1}}
    ((?: [_^&'] (?: (?!\n\s*\n) [^_^&'] )* ){{80}})
                                             =>  \1\n\n
    ((?: (?!\n\s*\n) [\s\S] ){{5000}})       =>  \1\n\n
"""
TOKEN = rf"""(?x)
    (?P<heading>  (?= \\(?:sub)*section{END} ) )                   # before it, all is closed
  | (?P<break>    \n\s*\n\s* | (?= \\item{END} | \\begin\{{(?:equation|{BLOCKS}) ) )
  | (?P<display>  \\begin\{{equation\*?\}} )
  | (?P<text>     \\begin\{{(?:{BLOCKS})\}} | \\(?:{TEXT})\*?\s*\{{ )
  | (?P<over>     \\begin\{{(?:{TABLES})\}} | \\(?:{OVER})\s*\{{ )
  | (?P<fraction> \\(?:{FRACTIONS})(?={ARGUMENT}\s*{ARGUMENT})\{{ )
  | (?P<group>    \{{ )
  | (?P<dollar>   \$ )
  | (?P<item>     \\item{END} )
  | (?P<cell>     & | \\\\ )
  | (?P<sign>     \\(?:{SIGNS}){END} | [_^](?=\s*\{{) )
  | (?P<prose>    [A-Za-z]{{3,}} [ \n] [a-z]{{2,}} (?! [^{{}}$]* \}} ) )
  | (?P<letter>   [{LETTERS}] | \\['`^"~=.](?:[A-Za-z]|\{{[A-Za-z]\}}) )
  | (?P<other>    \\(?:ref|eqref|cite)(?:\[[^][{{}}]*\])?\{{[A-Za-z0-9:.,/_\ -]*\}}
                | \\(?:q?quad|l?dots|S){END} | \\[ {{}}%#&_$,;:!|]
                | [ \t\n!"'-\[\]`-z|~] )
  | (?P<end>      \}} | \\end\{{[a-z*]+\}} | . )
"""
DEEP = 14  # how much may be open at a time; a fraction itself needs up to five places

MACRO = r'(?m)^\\newcommand\*?\s*\{?\\([A-Za-z]+)\}?\s*(?:\[(\d)\])?\s*\{(.*)\}$'
PREAMBLE = r"""\documentclass{amsart}
\usepackage{amssymb}
\allowdisplaybreaks
\let\boldsymbol\mathbf
\def\mathaccentV#1#2#3#4{\mathaccent"#2#3#4 }
\let\headed\section
\renewcommand\section{\goodbreak\headed}
\renewcommand\ref[1]{\texttt{\detokenize{#1}}}
\renewcommand\eqref[1]{(\ref{#1})}
\renewcommand\cite[2][]{[\ref{#2}]}
\newcommand\name{}
\newtheorem{block}{\expandafter\MakeUppercase\name}[section]
\newenvironment{called}[1]{\renewcommand\name{#1}\begin{block}}{\end{block}}
\title{A dream}
\author{Wolfgang-GPT}
\date{\today}
\begin{document}
\maketitle
"""


def mend(text, rules):
    """LaTeX that TeX gets through, as near to a text as it gets.

    What is open is closed where its surroundings end; what closes nothing goes. Mathematics in a
    text brings its own dollar. A word that isn't known to be harmless shows its name.
    """
    for ways, way in rules:
        text = re.sub(ways, way, text, flags=re.VERBOSE)
    out = []
    closers = ['\\end{document}']  # of what is open, how it ends
    math = [False]  # and whether mathematics stands in it, or text

    def push(written, closer, mode):
        out.append(written)
        closers.append(closer)
        math.append(mode)

    def close(place):
        while len(closers) > place:
            out.append(closers.pop())
            math.pop()

    for token in re.finditer(TOKEN, text):
        kind, written = token.lastgroup, token[0]
        if kind == 'heading' or len(closers) > DEEP:
            close(1)
        if kind == 'break' or kind == 'prose' and math[-1]:  # a paragraph, a formula ends
            while math[-1] or closers[-1] == '}':
                close(len(closers) - 1)
        if kind in ('sign', 'over', 'fraction', 'dollar') and not math[-1]:  # a formula begins
            push('$ ', '$', True)
            if kind == 'dollar':
                continue

        if kind == 'fraction' and len(closers) > DEEP - 6:
            written = '{'
        if kind in ('text', 'display', 'over', 'fraction', 'group'):
            closer = written.replace('begin', 'end') if 'begin' in written else '}'
            push(written, closer, {'text': False, 'display': True}.get(kind, math[-1]))
        elif written in closers:
            close(len(closers) - 1 - closers[::-1].index(written))
        else:
            fits = dict(cell=math[-1] and closers[-1].startswith('\\end'), letter=not math[-1],
                        item=len(closers) > 1, end=False, dollar=False)
            out.append(written if fits.get(kind, True) else '{}')
    close(1)
    return ''.join(out)


def document(texts):
    """A paper of these texts, the author's macros in them written out."""
    rules = []
    for name, n, meaning in reversed(re.findall(MACRO, '\n'.join(saved.get('macros', [])))):
        n = int(n or 0)
        word = rf'\\{name}{END}' + rf'({ARGUMENT})' * n + '()' * (9 - n)
        rules.append((word, re.sub('#([1-9])', r'\\g<\1>', meaning.replace('\\', r'\\'))))
    rules += re.findall(r'(?s)(\S.*?)\s+=>\s+(\S+)', SPELLINGS)
    body = '\n\n\\section*{Another dream}\n\n'.join(mend(text, rules) for text in texts)
    return f'{PREAMBLE}{body}\n\\end{{document}}\n'


# -------------------------------------------------------------------------------------------------
# What was asked for

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

    content = tokenizer.decode(ids.tolist())
    ends = [*itertools.accumulate(map(len, tokenizer.stream(ids.tolist())))]  # of each token
    prose = HIDDEN.sub(lambda match: '%' * len(match.group()), content)
    words = misspelt([0, *bits.tolist()])
    for slip in words[:20]:
        expected = slip['expected'] or 'another word'
        print(f"line {slip['line']}: {slip['word']}, {slip['bits']:.0f} bits; expected {expected}")
    for at, sign in unpaired():
        print(f'line {line(at)}: no {sign} after {content[max(0, at - 30):at]!r}?')
    if page:
        some = 2**16  # what a browser can take
        hidden = [[bisect(ends, at) for at in match.span()] for match in HIDDEN.finditer(content)]
        show(page, ids[:some], bits[:some - 1], *(x[:some] for x in likely), kind='text',
             title=title, quiet=hidden, words=[slip for slip in words[:100] if slip['at'] < some])

else:
    idx = torch.tensor([prompt], device=device).expand(num_samples, -1)
    chance = torch.Generator(device).manual_seed(seed)
    columns = generate(model, idx, max_new_tokens, temperature=temperature, top_k=top_k,
                       top_p=top_p, generator=chance)
    texts = []
    for n, copy in enumerate(itertools.tee(columns, num_samples)):  # the first text as it comes
        print('\n' + '-' * 80 + '\n' if n else '', start, sep='', end='')
        texts.append(start)
        for piece in tokenizer.stream(int(column[n]) for column in copy):
            print(piece, end='', flush=True)
            texts[n] += piece
    print()
    if tex:
        try:
            gpt.write(tex, document(texts).encode())
        except OSError as error:
            fail(f'{tex}: {error}')
        print(f'written {tex}; to see it: pdflatex -interaction=nonstopmode {tex}, or Overleaf')
