"""
Papers in, tokens out: reads LaTeX, cleans it, learns a tokenizer, writes what train.py reads.

    python prepare.py                                    the papers of papers/
    python prepare.py --source=FOLDER --dataset=NAME     your own: .tex, .zip, .tar.gz, arXiv's .gz
"""
import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from array import array
from collections import Counter, defaultdict
from contextlib import redirect_stderr, suppress
from functools import partial
from math import log2
from pathlib import Path

from gpt import MAX_VOCAB, TOKENIZERS, UNKNOWN, fail, load, override, quiet, write
from arxiv_latex_cleaner.arxiv_latex_cleaner import run_arxiv_cleaner

# -------------------------------------------------------------------------------------------------
source = 'papers'  # a file, a folder with all that is in it, or an archive
dataset = 'papers'  # the name of the data set
data_dir = 'data'  # the folder of data sets
tokenizer = 'bpe'  # bpe, word or char
vocab_size = 3072  # the most tokens that are learned
val_fraction = 0.1  # the share of the characters, the last ones, that is kept for validation
tokenizer_from = ''  # a checkpoint whose tokenizer is taken instead, for finetuning it
# -------------------------------------------------------------------------------------------------
config = override(globals(), tokenizer=[*TOKENIZERS], vocab_size=(257, MAX_VOCAB),
                  val_fraction=(0.001, 0.9))
quiet()

LARGEST = 2**30  # the most bytes that are read of one file, all that is packed in it included
SMALL = 500_000  # with fewer characters than this one had better finetune

sources = []  # what became of each file that might be LaTeX
others = Counter()  # the endings of all other files
macros = {}  # the definitions that the papers make


def note(path, why, before=0, after=0):
    """Keep what became of a file: cleaned, stripped (the cleaner failed) or skipped, and why."""
    status = 'skipped' if after == 0 else 'stripped' if why else 'cleaned'
    sources.append(dict(path=repr(path)[1:-1],  # on one line, whatever is in a name
                        status=status, characters_before=before, characters_after=after, why=why))
    if sys.stdout.isatty():
        print(f'{len(sources)} files', end='\r')


# ------------------------------------------------------------------------------------- finding it

# LaTeX, an archive, or what arXiv hands out: a number for a name, or a name without an ending.
WANTED = re.compile(r'(?is).*\.(tex|ltx|latex|zip|tar|t?gz|t?bz2?|t?xz|rar|7z|zst|z)'
                    r'|[\d.]+(v\d+)?|[^.]*')
TEX = re.compile(r'(?i)\.(tex|ltx|latex)(\.(gz|bz2|xz))?$')
LATEX = re.compile(rb'\\(document(class|style)|begin *\{|input\b|def *\\|(sub)*section|chapter)')
COMPRESSED = {b'\x1f\x8b\x08': gzip.open, b'BZh': bz2.open, b'\xfd7z': lzma.open}


def files(top):
    """Yield the paths of all files in a folder and its folders. Links are not followed."""
    def unread(error):
        note(error.filename, error.strerror)

    for folder, folders, names in os.walk(top, onerror=unread):
        folders[:] = sorted(set(folders) - {'.git'})
        for name in folders + sorted(names):
            path = os.path.join(folder, name)
            if os.path.islink(path):
                note(path, 'a link: name what it leads to as --source')
            elif os.path.isfile(path):
                yield path


def take(file):
    """All that is in an open file, where that is not too much."""
    global left  # how many more bytes may be read
    data = bytearray()
    while part := file.read(2**16):
        data += part
        left -= len(part)
        assert left >= 0, f'larger than {LARGEST >> 30} GB'
    return data


def packed(path, file):
    """Yield (path, how to open it) of each file that is packed in an open one. Its first bytes
    say whether there are any, not its name. Nothing is written."""
    head = file.read(3)
    file.seek(0)
    if head in COMPRESSED:
        yield path, partial(COMPRESSED[head], file)  # one file, perhaps a tar
        return
    if head in (b'PK\3', b'PK\5'):
        archive = zipfile.ZipFile(file)
        for member in archive.infolist():
            name = f'{path}/{member.filename}'
            if member.compress_type > zipfile.ZIP_DEFLATED:  # would unpack all at once
                note(name, 'neither stored nor deflated')
            elif not member.is_dir():
                yield name, partial(archive.open, member)
        return
    try:
        archive = tarfile.open(fileobj=file, mode='r:')
    except tarfile.ReadError:
        return
    for member in archive:
        if member.isfile():
            yield f'{path}/{member.name}', partial(archive.extractfile, member)


def unpack(path, opener, depth=0):
    """Yield (path, bytes) of the LaTeX in a file, however it is packed. A file that is none is
    noted or, if its name promises none, counted."""
    base = os.path.basename(path)
    if not WANTED.fullmatch(base) and path != source:
        others[base[base.rindex('.'):].lower()] += 1
        return
    try:
        assert depth < 6, 'archives within archives within archives'
        with opener() as file:
            if depth:  # what is packed is read in memory
                file = io.BytesIO(take(file))
            members = list(packed(path, file))
            for name, how in members:
                yield from unpack(name, how, depth + 1)
            if not members:
                file.seek(0)
                data = take(file)
                if LATEX.search(data) or TEX.search(path):
                    yield path, data
                else:
                    note(path, 'no LaTeX in it')
    except Exception as error:  # whatever a damaged file may cause
        note(path, str(error) or type(error).__name__)


def documents():
    """Yield (path, bytes) of every LaTeX file of the source."""
    global left
    for path in files(source) if os.path.isdir(source) else [source]:
        left = LARGEST
        yield from unpack(path, partial(open, path, 'rb'))


# ------------------------------------------------------------------------------------- reading it

JUNK = re.compile(r"""(?xi) \s* (?: (?P<HTML> <(?:!doctype|!--|\?xml|html|head|body) )
                                  | (?P<RTF> \{\\rtf )
                                  | (?P<PostScript> \x04? %!(?:ps|\s*\n) )
                                  | (?P<PDF> %pdf- )
                                  | (?P<git_lfs> version\ https?:// )
                                  | (?P<binary> (?:[^\0]{0,500}\0){2} ))""")

# An inputenc that isn't commented out, and what Python calls it where the names differ.
INPUTENC = re.compile(rb"""(?xmi) ^ [^%\r\n]* (?: \[ (?:[^][]*,)? \s* | \\inputencoding\{ )
                           ( (?:latin|ansi|apple|mac|cp|koi|iso) [\w-]* )
                           \s* (?: \] \s* \{ [^}]* inputenc \b | \} )""")
CODECS = {'latin1': 'cp1252', 'ansinew': 'cp1252', 'applemac': 'mac-roman', 'macce': 'mac-latin2',
          'maccyr': 'mac-cyrillic', 'iso88595': 'iso8859-5', 'koi8-ru': 'koi8-u'}


def decode(data):
    """Bytes to text, and the encoding: UTF-16 if there is its mark; UTF-8 if that fits everywhere;
    else for each line the first that fits of UTF-8, what inputenc declares, and cp1252."""
    if data[:2] in (b'\xff\xfe', b'\xfe\xff'):
        return data.decode('utf-16', 'replace'), 'utf-16'
    with suppress(UnicodeError):
        return data.decode(), 'utf-8'
    found = INPUTENC.search(data)
    declared = found[1].decode().lower() if found else 'cp1252'
    declared = CODECS.get(declared, declared)

    def line(data):
        for codec in 'utf-8', declared:
            with suppress(UnicodeError, LookupError):
                return data.decode(codec)
        return data.decode('cp1252', 'replace')

    return ''.join(map(line, data.splitlines(keepends=True))), declared


# ------------------------------------------------------------------------------------ cleaning it

# Read from left to right, each of these is taken as a whole, as TeX does.
VERBATIM = re.compile(r"""(?xs)
    \\[\\%]                                             # a pair: no comment begins here
  | (?P<comment> % [^\n]* | \\begin\{comment\} .*? \\end\{comment\} )
  | \\begin\{ ((?:[A-Z][a-z]*|sp)?[vV]erbatim\*?|(?:lstlisting|minted|alltt|filecontents)\*?) \}
    (?: (?!\\begin\{\2\}) . )*? \\end\{\2\}             # a listing, if it is ever closed
  | \\(?: (?:verb|Verb|lstinline)\*? (?:\[[^][\n]*\])?    # a listing within a line
        | mint(?:inline)? (?:\[[^][\n]*\])? \{\w+\} )
    (?: \{ (?:[^{}\n]|\{[^{}\n]*\})* \} | ([^\w\s*]) [^\n]*? \3 )
  | \\(?:url|href|nolinkurl|burl|path|doi)\*? [ ]? (?:\[[^][\n]*\])?
    \{ (?:[^{}\n]|\{[^{}\n]*\})* \}                     # an address
  | \\url ([^\w\s*{]) [^\n]*? \4
""")
HIDE = str.maketrans('\\%', '\ufdd0\ufdd1')  # these two are in no text
SHOW = str.maketrans('\ufdd0\ufdd1', '\\%')

# A file is cut where a document ends or begins, and where TeX is told to read no further.
CUT = re.compile(r"""(?xm) (?<=\\end\{document\})
    | ^(?= \\document(?:class|style)\b | \\endinput\b (?!.*\s*\\(?:fi|else)\b) )""")
BEGIN = re.compile(r'(?s)\\begin\{document\}'
                   r'|\\document(?:class|style)\b(?!.*\\begin\{document\})')

# A macro's definition: braces within braces, and never its own name.
BRACES = r'\{(?:[^{}\\]|(?!\1\b)\\.)*\}'
for _ in range(4):
    BRACES = BRACES.replace('[^', BRACES + '|[^', 1)
MACRO = re.compile(r'(?s)\\(?:newcommand|DeclareMathOperator)\*?\s*\{?(\\[A-Za-z]+)\}?'
                   rf'\s*(?:\[\d\])?(?:\[[^][]*\])?\s*{BRACES}')


def uncomment(text):
    """Hide what is verbatim, and take out comments: as TeX does, with the end of their line and
    the indentation of the next; but a paragraph's end stays, and so does a control word's."""
    def hide(match):
        return '%' if match['comment'] else match[0].translate(HIDE)

    text = VERBATIM.sub(hide, text)
    text = re.sub(r'(?m)^[ \t]*%\n', '', text)
    text = re.sub(r'(\\[A-Za-z@]+)%\n[ \t]*(?=[A-Za-z])', r'\1 ', text)
    return re.sub(r'%(\n[ \t]*(?=\S))?', '', text)


def collapse(text):
    """Make one of several blank lines."""
    return re.sub(r'\n\s*\n', '\n\n', text)


def clean(text):
    """What TeX prints of a file; and why arxiv-latex-cleaner failed if it did. Then it is enough
    that comments are gone."""
    text = collapse(uncomment(text))
    for macro in MACRO.finditer(text):
        macros[macro[1]] = macro[0].translate(SHOW)
    parts = CUT.split(text)
    begun = [part[begin.start():] for part in parts if (begin := BEGIN.search(part))]
    parts = begun or parts[:1]
    why = ''
    for i, part in enumerate(parts):
        try:
            parts[i] = run_cleaner(part)
        except Exception as error:
            why = f'arxiv-latex-cleaner: {type(error).__name__}; comments stripped simply'
    return collapse('\n\n'.join(parts)).translate(SHOW).strip(), why


def run_cleaner(text):
    """The cleaner's public function, all its options off, on one file in a folder by itself."""
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        paper = Path(folder, 'in/paper.tex')
        paper.parent.mkdir()
        paper.write_text(text, encoding='utf-8')
        run_arxiv_cleaner(defaultdict(list, input_folder=f'{folder}/in'))
        return Path(folder, 'in_arXiv/paper.tex').read_text(encoding='utf-8')


def without_repeats(text):
    """Drop each paragraph of 100 characters or more that has been seen before."""
    seen, kept = set(), []
    for paragraph in text.split('\n\n'):
        if len(paragraph) < 100 or paragraph not in seen:
            kept.append(paragraph)
            seen.add(paragraph)
    return '\n\n'.join(kept)


def runs(text):
    """A hash of each run of twelve words in a paragraph, white space aside."""
    for paragraph in text.split('\n\n'):
        words = paragraph.split()
        for i in range(len(words) - 11):
            yield hash(tuple(words[i:i + 12]))


def only_new(val, train):
    """Drop each paragraph of val most of whose runs of twelve words stand in train: what was
    learned by heart would flatter. One of fewer than twelve words stays."""
    known = set(runs(val)).intersection(runs(train))

    def new(paragraph):
        found = [run in known for run in runs(paragraph)]
        return found.count(True) <= found.count(False)

    return '\n\n'.join(filter(new, val.split('\n\n')))


# -------------------------------------------------------------------------------------- measuring

def yardsticks(train, val, V):
    """Bits that val takes under three models, counted on train with one added to each count:
    p(b) = 1 / V,   p(b) = (n_b + 1) / (N + V),   p(b | a) = (n_ab + 1) / (n_a + V)."""
    n, N = Counter(train), len(train)
    n_pair = Counter(zip(train, train[1:]))
    p = {'uniform': [1 / V] * len(val),
         'unigram': [(n[b] + 1) / (N + V) for b in val],
         'bigram': [(n_pair[a, b] + 1) / (n[a] + V)
                    for a, b in zip(train[-1:] + val, val)]}
    return {name: -sum(map(log2, p[name])) for name in p}


def xz(train, val):
    """Bits that xz needs for the text val after the last 4 MB of the text train."""
    known = train.encode()[-2**22:]
    both = lzma.compress(known + val.encode())
    return 8 * (len(both) - len(lzma.compress(known)))


# ------------------------------------------------------------------------------------ the data set

PARTS = 'train.bin', 'val.bin', 'meta.json'
folder = Path(data_dir, dataset)
place = folder.resolve()
new, old = Path(f'{place}.tmp'), Path(f'{place}.old')


def put_right():
    """Undo what a swap left that was cut short, if nothing is in the way but data sets."""
    for path in filter(Path.exists, [place, new, old]):
        for file in path.iterdir():
            if file.name.removesuffix('.tmp') not in PARTS:
                fail(f'{path} holds more than a data set; --dataset=NAME takes another name')
    if old.exists() and not place.exists():
        old.rename(place)
    for path in old, new:
        shutil.rmtree(path, ignore_errors=True)


def swap_in(*parts):
    """Write a new folder beside the old one, and let it take its place."""
    new.mkdir(parents=True)
    for name, data in zip(PARTS, parts):
        write(new / name, data)
    if place.exists():
        place.rename(old)
    new.rename(place)
    put_right()


# -------------------------------------------------------------------------------------- the script

put_right()

papers, encodings = [], Counter()
for path, data in documents():
    text, encoding = decode(data)
    text = re.sub('\r\r?\n|\r', '\n', text.rstrip('\0')).replace('\ufeff', '')
    if junk := JUNK.match(text):
        note(path, f'{junk.lastgroup}, not LaTeX')
        continue
    paper, why = clean(text.replace('\0', ''))
    note(path, why if paper else 'nothing is left of it', len(text), len(paper))
    if paper:
        papers.append(paper)
        encodings[encoding] += 1
if not papers:
    why = f' ({sources[0]["path"]}: {sources[0]["why"]})' if sources else ''
    fail(f'--source={source}: no LaTeX found{why}')

papers.sort(key=lambda paper: hashlib.sha256(paper.encode()).digest())
text = without_repeats('\n\n'.join(papers))
cut = int(len(text) * (1 - val_fraction))
train = text[:cut]
val = only_new(text[cut:], train)
left_out = len(text) - len(train + val)
text = train + val

if tokenizer_from:
    _, tokens, _ = load(tokenizer_from)
else:
    print(f'learning tokens from {cut:,} characters ...')
    size = MAX_VOCAB if tokenizer == 'char' else vocab_size
    tokens = TOKENIZERS[tokenizer].learn(train, size)
V = len(tokens.tokens)

ids, meta = {}, {}
for name, part in ('train', train), ('val', val):
    ids[name] = array('H', tokens.encode(part))
    meta[name] = dict(characters=len(part), bytes=len(part.encode()),
                      tokens=len(ids[name]))
    if len(ids[name]) < 3:
        fail(f'the {name} part has {len(ids[name])} tokens of {len(text)} characters in all; '
             f'{left_out} were left out of the validation part, since they stand in the training '
             'part; more papers are needed, or another --val_fraction')

bits = dict(yardsticks(ids['train'], ids['val'], V), xz=xz(train, val))
meta.update(vocab_size=V, left_out=left_out, macros=[*macros.values()], sources=sources,
            tokenizer=dict(kind=tokens.kind, learned=tokens.learned),
            yardsticks={name: bits[name] / len(val) for name in bits})
swap_in(ids['train'], ids['val'], json.dumps(meta).encode())

amiss = [row for row in sources if row['status'] != 'cleaned']
for row in amiss[:20]:
    print(f'  {row["status"]}: {row["path"]} ({row["why"]})')
every = ids['train'] + ids['val']
print(f"""read         {len(papers)} files, {len(sources) - len(papers)} skipped; \
{folder}/meta.json lists them all
not LaTeX: {', '.join(f'{n} {ending}' for ending, n in others.most_common()) or 'no others'}
encodings    {', '.join(f'{n} in {name}' for name, n in encodings.most_common())}
characters   {sum(row['characters_before'] for row in sources):,}, cleaned {len(text):,}; \
{len(set(text))} different ones
left out     {left_out:,} characters of the last {val_fraction:.0%}: \
they stand nearly so in the rest
begins       {' '.join(text[:60].split())}
tokens       {len(every):,} of {V:,} kinds ({tokens.kind}), \
{len(text) / len(every):.2f} characters a token
unknown      {every.count(tokens.ids.get(UNKNOWN, MAX_VOCAB)):,} of the tokens
split        {len(ids['train']):,} to train, {len(ids['val']):,} to validate
yardsticks   {', '.join(f'{name} {bits:.3f}' for name, bits in meta['yardsticks'].items())} \
bits per character""")

named = f'--dataset={dataset}'
if data_dir != 'data':
    named += f' --data_dir={data_dir}'
next_line = f'python train.py {named} --out_dir=out-{dataset}'
if tokenizer_from:
    next_line += f' --init_from={tokenizer_from}'
elif len(text) < SMALL:
    print(f"""small        too little to learn a language from, but enough to finetune a model:
    python prepare.py --source={source} {named} --tokenizer_from=out/ckpt.safetensors
    {next_line} --init_from=out/ckpt.safetensors""")
elif named == '--dataset=papers':
    next_line = 'python train.py'  # that is its default
print(f'written      {folder}; next: {next_line}')
