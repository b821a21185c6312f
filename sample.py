"""
Text from a trained model, as a paper too; a proof-reader; and two pages that show how it reads.

    python sample.py
    python sample.py --start='\\begin{theorem}' --temperature=0.8
    python sample.py --start=FILE:prompt.tex
    python sample.py --tex=dream.tex
    python sample.py --start='Let $X$ be' --attention=attention.html
    python sample.py --text=paper.tex --page=paper.html
"""
import re
from bisect import bisect
from collections import Counter
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path

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
tex = ''  # a file to write (.tex): the texts as a document for LaTeX
# -------------------------------------------------------------------------------------------------
config = override(globals(), num_samples=[1, 10_000], top_p=[1e-6, 1])
quiet()
if page and not text or tex and (attention or text):
    fail('--page goes with --text=FILE; --tex goes without --text and --attention')
for name, ending in (attention, '.html'), (page, '.html'), (tex, '.tex'):
    if name and not name.endswith(ending):
        fail(f'{name}: the name of this file has to end in {ending}')


def contents(path):
    return Path(path).expanduser().read_text('utf-8-sig', 'replace')


model, tokenizer, saved = load(Path(out_dir, 'ckpt.safetensors'))
device = pick_device(device)
window = model.config.block_size
model.to(device).eval().requires_grad_(False)
if start.startswith('FILE:'):
    start = contents(start[5:])
prompt = torch.tensor(tokenizer.encode(start or '\n'))[-window:]  # (T,)


def read(ids):
    """What the model thinks of a text (N,): the surprise in bits at each token, (N,), with 0 for
    the first; and after each token p and the ids of the five likeliest to follow, (N, 5, 2).

    The model reads half a window at a time, after the half that came before.
    """
    bits, likely, half = [torch.zeros(1)], [], (window + 1) // 2
    for at in range(0, len(ids), half):
        begin = max(0, at + half - window)
        logits = model(ids[None, begin:at + half].to(device))[0, at - begin:]
        p = logits.cpu().double().softmax(-1)
        follow = ids[at + 1:at + half + 1]
        bits.append(-p[range(len(follow)), follow].log2())
        likely.append(torch.stack(p.topk(5), dim=-1))
    return torch.cat(bits), torch.cat(likely)


def show(path, ids, bits, likely, **more):
    """Write the page of a text that was read."""
    tokens = [token.decode('utf-8', 'backslashreplace') for token in tokenizer.tokens]
    write_page(path, ids=ids.tolist(), bits=bits, likely=likely, tokens=tokens, **more)
    print(f'written {path}, {len(ids):,} tokens; open it in a browser')


# -------------------------------------------------------------------------------------------------
# The proof-reader: a slip surprises a model that knows an author's papers

HIDDEN = re.compile(r"""(?xs)
    (?: \A | \\end\{document\} ) .*? \\begin\{document\}          # a preamble
  | \\end\{document\} .*                                          # what stands behind the end
  | % [^\n]*                                                      # a comment
  | \\verb ([^\w\s]) [^\n]*? \1                                   # code
  | \\begin\{ (verbatim|lstlisting) \} .*? \\end\{ \2 \}
  | (?: (?<=label) | (?<=ref) | (?<=cite) ) \{ [^{}\s]* \}        # a name
""")
WORD = re.compile(r'\\[A-Za-z@]+|\b[^\W\d_][^\W\d_A-Z]+\b')  # control words; words, but no ABC

# Two braces, or two dollars of one paragraph, with none in between. In a formula no word stands
# before another word, nor at the end.
PAIR = re.compile(r"""(?x)
    \{ [^{}$]* \}
  | \$ (?: (?! \n\s*\n | (?<![\\A-Za-z]) [a-z]{2,} \s+ [a-z$] ) [^{}$] )* \$
""")


def hide(match):
    return re.sub(r'\S', '.', match[0])


def misspelt(prose, ends, bits):
    """The words that aren't known, the likeliest slips first. Token i ends at ends[i] and has
    bits[i]. A word is known if it stands twice or is a token; and then so is its capitalised form.
    In the order, not in what is printed, the bits of a word that is close to a known one count
    twice."""
    # No word begins after _. So of the tokens only those with a blank in front count as words.
    tokens = b'\n_'.join(tokenizer.tokens).decode(errors='replace')
    times = Counter(WORD.findall(f'{prose}\n_{tokens}\n_{tokens}'))  # so a token stands twice
    known = {word for word in times if times[word] > 1}
    slips = []
    for match in WORD.finditer(prose):
        word = match[0]
        if not {word, word.lower()} & known:
            first, end = (bisect(ends, place) for place in match.span())
            close = get_close_matches(word, known, 1, 0.75)
            slips.append(dict(
                at=first, line=prose.count('\n', 0, match.start()) + 1, word=word,
                bits=float(bits[first:end].sum()),
                expected=close[0] if close else 'another word'))
    return sorted(slips, key=lambda slip: -slip['bits'] * (2 if slip['expected'] in known else 1))


# -------------------------------------------------------------------------------------------------
# The dream: what was written, as a document for LaTeX

# The words that are known: of mathematics, without arguments, with one, with two; with text as
# argument; others that are kept; and those that are left out
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
ARGUMENT = r'\{(?:[^{}\\]|\\.|\{(?:[^{}\\]|\\.|\{(?:[^{}\\]|\\.)*\})*\})*\}'  # braces in it

# What may stand in a fraction, which is written as a whole: TeX doesn't survive half a fraction
PLAIN = rf"""(?x: [A-Za-z0-9 +*/=<>()[\].,;:!|'-] | \n(?!\s*\n) | \\[ {{}},;:!|]
    | \\(?: {SIGNS} | q?quad | l?dots ){END} | \\text[a-z]*\{{[A-Za-z ]*\}}
    | (?: [_^] | \\(?:{OVER}) ) (?= \s*\{{ )
    | \\(?:{FRACTIONS}) (?= \s*{GROUP} \s*{GROUP} ) )"""
FILLED = rf'\s*\{{(?:{PLAIN}|\{{(?:{PLAIN}|\{{{PLAIN}*\}})*\}})*\}}'

# Each line: a pattern => what takes its place. Many spellings become the few that TOKEN knows. An
# unknown word becomes its name, an argument gets its braces. The last lines are against what stops
# TeX: two scripts of a kind in a row, a title that never ends, a hundred errors in a paragraph
# (so a long one becomes two).
SPELLINGS = rf"""
    \s?\\(?:begin|end)\{{document\}} | \s?\\label{GROUP} | \s?\\{SILENT}{END}\.?  =>  \t
    \\par{END}                               =>  \n\n
    \\[()]                                   =>  $
    \$\$ ((?: (?!\n\s*\n)[\s\S] )*?) \$\$    =>  \\[\1\\]
    \\\\ (?: \s* \[[^][\n]*\] )?             =>  \\\\{{}}
    \\sqrt \s* \[[^][\n]*\]                  =>  \\sqrt
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
    (_ {ARGUMENT} (?: \s* (?: \^{ARGUMENT} | ' ) )*) (?= \s*_ )
                                             =>  \1{{}}
    ((?: \^{ARGUMENT} | ' (?= \s*_ ) ) (?: \s*_{ARGUMENT} )?) (?= \s*['^] )
                                             =>  \1{{}}
    (section\*?\{{ [^{{}}]{{300}})           =>  \1}}
    ((?: [_^&'] (?: (?!\n\s*\n) [^_^&'] )* ){{80}})
                                             =>  \1\n\n
    ((?: (?!\n\s*\n) [\s\S] ){{5000}})       =>  \1\n\n
"""
TOKEN = rf"""(?x)
    (?P<heading>  (?= \\(?:sub)*section{END} ) )                   # before it all is closed
  | (?P<break>    \n\s*\n\s* | (?= \\item{END} | \\begin\{{(?:equation|{BLOCKS}) ) )
  | (?P<block>    \\begin\{{(?:{BLOCKS})\}} )
  | (?P<text>     \\(?:{TEXT})\*?\s*\{{ )
  | (?P<formula>  \$ | \\begin\{{equation\*?\}} )
  | (?P<over>     \\begin\{{(?:{TABLES})\}} | [_^]\s*\{{ | \\(?:{OVER})\s*\{{ )
  | (?P<group>    \{{ )
  | (?P<item>     \\item{END} )
  | (?P<cell>     & | \\\\(?=\{{\}}) )
  | (?P<sign>     \\(?:{SIGNS}){END} | \\(?:{FRACTIONS}){FILLED}{FILLED} )
  | (?P<prose>    [A-Za-z]{{3,}} [ \n] [a-z]{{2,}} (?! [^{{}}$]* \}} )
                | [{LETTERS}] | \\['`^"~=.](?:[A-Za-z]|\{{[A-Za-z]\}}) )
  | (?P<other>    \\(?:ref|eqref|cite)(?:\[[^][{{}}]*\])?\{{[A-Za-z0-9:.,/_\ -]*\}}
                | \\(?:q?quad|l?dots|S){END} | \\[ {{}}%#&_$,;:!|]
                | [ \t\n!"'-\[\]`-z|~] )
  | (?P<end>      \}} | \\end\{{[a-z*]+\}} | . )
"""
DEEP = 14  # how much may be open at a time

MACRO = r'(?m)^\\newcommand\*?\s*\{?\\([A-Za-z]+)\}?\s*(?:\[\d\])?\s*\{(.*)\}$'
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


def spell(text):
    """A text in the words that TOKEN knows, the macros that \\newcommand made for the author
    written out."""
    rules = re.findall(r'(?s)(\S.*?)\s+=>\s+(\S+)', SPELLINGS)
    for name, meaning in re.findall(MACRO, '\n'.join(saved.get('macros', []))):
        arguments = int(max(re.findall('#([1-9])', meaning), default=0))
        word = rf'\\{name}{END}' + f'({ARGUMENT})' * arguments
        meaning = re.sub('#([1-9])', r'\\g<\1>', meaning.replace('\\', r'\\'))
        rules.insert(0, (word, meaning))  # the last one first: it may use those before
    for ways, way in rules:
        text = re.sub('(?x)' + ways, way, text)
    return text


def document(text):
    """A paper that TeX gets through, as near to a text as it gets.

    What is open is closed where its surroundings end; what closes nothing goes. Mathematics in a
    text brings its own dollar.
    """
    tokens = [(token.lastgroup, token[0]) for token in re.finditer(TOKEN, spell(text))]
    tokens.reverse()  # the next is the last
    out = [PREAMBLE]

    def fill(math, *closers):
        """Write what is in a formula or a text, and closers[0] to end it. The other closers are
        those of what is around it."""
        inner = len(closers) > 1
        # What ends it, beside closers; and what may not stand in it, unless this says so.
        ends = {'heading': inner, 'break': math or closers[0] == '}', 'prose': math}
        table = math and '\\end' in closers[0]
        fits = {'cell': table, 'item': inner, 'end': False, 'formula': False}
        if len(closers) > DEEP:
            tokens.append(('heading', '\n\n'))  # which closes all
        while tokens:
            kind, written = tokens.pop()
            if kind in ('sign', 'over') and not math:
                tokens.extend([(kind, written), ('formula', '$')])
            elif kind in ('block', 'text', 'over', 'group') or kind == 'formula' and not math:
                out.append(written.replace('$', '$ '))
                closer = '}' if written[-1] == '{' else written.replace('begin', 'end')
                fill(kind in ('over', 'formula') or kind == 'group' and math, closer, *closers)
            elif ends.get(kind, written in closers):
                if written != closers[0]:
                    tokens.append((kind, written))
                break
            else:
                out.append(written if fits.get(kind, True) else '{}')
        out.append(closers[0])

    fill(False, '\\end{document}\n')
    return ''.join(out)


# -------------------------------------------------------------------------------------------------
# What was asked for

if attention:
    ids = prompt[-256:]  # what a page can show
    bits, likely = read(ids)
    layers = []  # of each the weights, (H, T, T)

    def watched(q, k, v, is_causal):
        layers.append(gpt.attention_weights(q, k, is_causal)[0])
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
    units = tokenizer.split(content)
    if tokenizer.kind == 'bpe':
        units = tokenizer.stream(ids.tolist())
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
    for match in re.finditer('[{}$]', prose):
        line = prose.count('\n', 0, match.start()) + 1
        print(f'line {line}: {match[0]} without a partner')
    if page:
        show(page, ids, bits, likely, kind='text', title=title, words=words, ends=ends,
             quiet=[match.span() for match in HIDDEN.finditer(plain)])

else:
    chance = torch.Generator(device).manual_seed(seed)
    dream = ''
    for n in range(num_samples):
        if n:
            print('-' * 80)
            dream += '\n\n\\section*{Another dream}\n\n'
        print(start, end='')
        dream += start
        tokens = generate(model, prompt[None].to(device), max_new_tokens, temperature=temperature,
                          top_k=top_k, top_p=top_p, generator=chance)
        for piece in tokenizer.stream(map(int, tokens)):  # as it comes
            print(piece, end='', flush=True)
            dream += piece
        print()
    if tex:
        gpt.write(tex, document(dream).encode())
        print(f'written {tex}; to see it: pdflatex -interaction=nonstopmode {tex}, or Overleaf')
