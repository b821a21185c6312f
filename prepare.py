"""
Papers in, tokens out: reads LaTeX, cleans it, learns a tokenizer, writes what train.py reads.

    python prepare.py                                    the papers of papers/
    python prepare.py --source=FOLDER --dataset=NAME     your own: .tex, .zip, .tar.gz, arXiv's .gz
"""
import bz2
import codecs
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import re
import signal
import sys
import tarfile
import tempfile
import zipfile
from array import array
from collections import Counter
from statistics import fmean

from gpt import MAX_VOCAB, TOKENIZERS, UNKNOWN, fail, limit, load, override
from arxiv_latex_cleaner.arxiv_latex_cleaner import run_arxiv_cleaner

# -------------------------------------------------------------------------------------------------
source = 'papers'  # a file, a folder with all that is in it, or an archive
dataset = 'papers'  # the name of the data set
data_dir = 'data'  # the folder of data sets
tokenizer = 'bpe'  # bpe, word or char
vocab_size = 2048  # the most tokens that are learned
val_fraction = 0.1  # the share of the characters, the last ones, that is kept for validation
tokenizer_from = ''  # a checkpoint whose tokenizer is taken instead, for finetuning it
# -------------------------------------------------------------------------------------------------
config = override(globals())
limit(config, tokenizer=list(TOKENIZERS), vocab_size=(257, MAX_VOCAB), val_fraction=(0.001, 0.9))

MEMBER = 2**26  # the most bytes that one file may have
WHOLE = 2**30  # the most bytes that one archive may unpack to
SMALL = 200_000  # characters; with fewer one had better finetune

sources = []  # what became of each file
others = Counter()  # how many files with other endings there were
macros = {}  # the definition of each macro that the papers define
scratch = tempfile.TemporaryDirectory()  # where the cleaner works; removed at the end

for name in 'SIGTERM', 'SIGHUP':  # end as Ctrl-C does, so that scratch is removed
    number = getattr(signal, name, signal.SIGINT)
    if signal.getsignal(number) != signal.SIG_IGN:  # it is ignored under nohup
        signal.signal(number, lambda *_: sys.exit(130))


def show(name):
    """A file's name on one line, whatever is in it."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def progress(message):
    if sys.stdout.isatty():
        print(message, end='\r', flush=True)


def note(path, status, before=0, after=0, why=''):
    row = dict(path=show(path), status=status, characters_before=before, characters_after=after,
               why=why)
    sources.append(row)
    progress(f'{len(sources)} files')
    return row


# ------------------------------------------------------------------------------------- finding it

PACKED = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zXZ': lzma.open}
ARCHIVE = re.compile(r'\.(zip|tar|t?gz|t?bz2?|t?xz|rar|7z|zst|z)$', re.I)
NUMBER = re.compile(r'[\d.]+(v\d+)?')  # as arXiv names papers
LATEX = re.compile(rb'\\(document|begin|end|input|def|(sub)*section|chapter)\b')


def is_latex(name):
    return name.lower().endswith(('.tex', '.ltx', '.latex'))


def expected(name):
    """Whether one expects papers in a file of this name, and is told when there are none."""
    base = os.path.basename(name)
    return bool(is_latex(base) or ARCHIVE.search(base) or NUMBER.fullmatch(base))


def count(name):
    ending = os.path.splitext(name)[1].lower()
    others[show(ending) or 'without an ending'] += 1


def files(top):
    """Yield the paths of all files in a folder and its folders. Links are not followed."""
    def unread(error):
        note(error.filename, 'skipped', why=error.strerror)

    for folder, folders, names in os.walk(top, onerror=unread):
        for name in sorted(folders + names):
            path = os.path.join(folder, name)
            if os.path.islink(path) and (name in folders or expected(name)):
                note(path, 'skipped', why='a link: name what it leads to as --source')
            elif os.path.isfile(path) and not os.path.islink(path):
                yield path
            elif name == '.git' or name in names:
                count(name)
        folders[:] = sorted(set(folders) - {'.git'})


class Capped:
    """A file for tarfile, which believes what a header says of sizes: nothing is found beyond
    WHOLE, and nothing is read by more than a megabyte at once."""

    def __init__(self, file):
        self.file = file
        self.tell = file.tell

    def seek(self, place):
        if place > WHOLE:
            raise ValueError(f'unpacks to more than {WHOLE >> 20} MB')
        self.file.seek(place)

    def read(self, size):
        if size > 2**20:
            raise ValueError('damaged')
        return self.file.read(size)


def take(file):
    """All that is in an open file, where that is not too much."""
    global left  # bytes that this source may still unpack to
    data = bytearray()
    while part := file.read(2**16):
        data += part
        left -= len(part)
        if len(data) > MEMBER or left < 0:
            raise ValueError(f'larger than {min(MEMBER, WHOLE) >> 20} MB')
    return bytes(data)


def members(path, file):
    """Yield (path, open file) of all that is packed in an open file, or else of itself. What it
    is, its first bytes say and not its name. Nothing is written."""
    head = file.read(6)
    file.seek(0)
    if head.startswith(b'PK'):
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                name = f'{path}/{member.filename}'
                if member.flag_bits & 1:
                    note(name, 'skipped', why='encrypted')
                elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    note(name, 'skipped', why='packed in another way than zip files mostly are')
                elif not member.is_dir():
                    with archive.open(member) as inside:
                        yield name, inside
        return
    for magic, unpacked in PACKED.items():
        if head.startswith(magic):
            file = unpacked(file)
            path = re.sub(r'\.(gz|bz2|xz)$', '', path)
    try:
        archive = tarfile.open(fileobj=Capped(file), mode='r:')
    except tarfile.ReadError:
        file.seek(0)
        yield path, file
        return
    for member in archive:
        if member.isfile():
            yield f'{path}/{member.name}', archive.extractfile(member)
        elif not member.isdir():
            count(member.name)


def unpack(path, file, depth=0):
    """Yield (path, bytes) of the LaTeX in an open file, however it is packed."""
    noted = len(sources)
    try:
        if depth:
            file = io.BytesIO(take(file))
        if depth > 5:
            raise ValueError('archives within archives within archives')
        for name, inside in members(path, file):
            if inside is file:
                data = take(file)
                if is_latex(name) or LATEX.search(data):
                    yield name, data
            elif expected(name) or '.' not in os.path.basename(name):
                yield from unpack(name, inside, depth + 1)
            else:
                count(name)
    except Exception as error:  # whatever a damaged file may cause
        note(path, 'skipped', why=str(error) or type(error).__name__)
    if len(sources) == noted:  # nothing was found, and nothing said why
        if expected(path) or path == source:
            note(path, 'skipped', why='no LaTeX in it')
        else:
            count(path)


def documents():
    """Yield (path, bytes) of every LaTeX file of the source."""
    global left
    for path in files(source) if os.path.isdir(source) else [source]:
        if path == source or expected(path) or '.' not in os.path.basename(path):
            left = WHOLE
            try:
                with open(path, 'rb') as file:
                    yield from unpack(path, file)
            except OSError as error:
                note(path, 'skipped', why=error.strerror)
        else:
            count(path)


# ------------------------------------------------------------------------------------- reading it

JUNK = re.compile(rb'''(?xi) \s* (?:
      (?P<HTML> <(?:!doctype|!--|\?xml|html|head|body) )
    | (?P<RTF> \{\\rtf )
    | (?P<PostScript> \x04? %!(?:ps|\s*\n) )
    | (?P<PDF> %pdf- )
    | (?P<git_lfs> version\ https?:// ))''')

MARKS = {codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',
         codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}
INPUTENC = re.compile(rb'''(?xm) ^ [^%\r\n]* (?: \[ ([^]]*) \] \s* \{ [^}]* inputenc \b
                                               | \\inputencoding \{ ([^}]*) \} )''')
CODECS = {  # what LaTeX calls otherwise than Python; Windows' code page is latin1 and more
    'latin1': 'cp1252', 'ansinew': 'cp1252', 'applemac': 'mac-roman', 'macce': 'mac-latin2',
    'maccyr': 'mac-cyrillic', 'koi8-ru': 'koi8-u', 'iso88595': 'iso8859-5', 'cp866av': 'cp866'}


def declared(data):
    """The codec that a file's own inputenc names, where Python has it."""
    found = INPUTENC.findall(data)
    for options in found[:1]:
        name = b''.join(options).decode('latin-1').split(',')[-1].strip().lower()
        name = CODECS.get(name, name)
        if re.match('(latin|cp|mac|koi|iso8859)', name):
            with contextlib.suppress(LookupError):
                return codecs.lookup(name).name
    return 'cp1252'


def decode(data):
    """Bytes to text, and the codec if it isn't UTF-8: by its mark or, line by line, as UTF-8, as
    its inputenc says, as cp1252."""
    for mark, codec in MARKS.items():
        if data.startswith(mark):
            return data.decode(codec, 'replace'), codec
    with contextlib.suppress(UnicodeError):
        return data.decode('utf-8'), ''
    codec = declared(data)
    lines = []
    for line in data.splitlines(keepends=True):
        for name, errors in ('utf-8', 'strict'), (codec, 'strict'), ('cp1252', 'replace'):
            with contextlib.suppress(UnicodeError):
                lines.append(line.decode(name, errors))
                break
    return ''.join(lines), codec


# ------------------------------------------------------------------------------------ cleaning it

# From left to right: what begins with one of these is read to its end, as TeX would.
VERBATIM = re.compile(r'''(?xs)
    \\[\\%]                                           # a pair: no comment begins here
  | % [^\n]*                                          # a comment
  | \\begin\{comment\} .*? \\end\{comment\}           # another
  | \\begin\{ ((?:[A-Z][a-z]*|sp)?[vV]erbatim\*?|(?:lstlisting|minted|alltt|filecontents)\*?) \}
    (?: (?!\\begin\{\1\}) . )*? \\end\{\1\}           # a listing; one that is never closed is none
  | \\(?:verb|Verb|lstinline|mint|mintinline)\*?      # a listing within a line
    (?:\[[^]\n]*\])? (?: (?<=mint|line) \{\w+\} (?=\S) )?
    (?: \{ (?:[^{}\n]|\{[^{}\n]*\})* \} | ([^\w\s*]) [^\n]*? \2 )
  | \\(?:url|href|nolinkurl|burl|path|doi)\*? [ ]? (?:\[[^]\n]*\])?      # an address
    \{ (?:[^{}\n]|\{[^{}\n]*\})* \}
  | \\url ([^\w\s*{]) [^\n]*? \3
''')
HIDE = str.maketrans('\\%', '\ufdd0\ufdd1')  # these two stand for no character
SHOW = str.maketrans('\ufdd0\ufdd1', '\\%')

# A file's documents: cut where one ends, or the next begins, or TeX is told to read no further.
CUT = re.compile(r'''(?xm) (?<=\\end\{document\})
    | ^(?= \\document(?:class|style)\b | \\endinput\b (?!.*\s*\\(?:fi|else)\b) )''')
BEGIN = re.compile(r'\\document(class|style)\b|\\begin\{document\}')

BRACES = r'\{(?:[^{}\\]|\\.)*\}'
for _ in range(4):  # how deep braces may stand within braces
    BRACES = rf'\{{(?:[^{{}}\\]|\\.|{BRACES})*\}}'
MACRO = re.compile(r'(?s)\\(?:newcommand|DeclareMathOperator)\*?\s*(?:\{(\\[A-Za-z]+)\}|'
                   rf'(\\[A-Za-z]+))\s*(?:\[\d\])?(?:\[[^]]*\])?\s*({BRACES})')


def uncomment(text):
    """Hide what is verbatim, and take out comments: as TeX does, with the end of their line and
    the indentation of the next; but a paragraph's end stays, and so does a control word's."""
    def hide(match):
        if match[0].startswith(('%', r'\begin{comment}')):
            return '%'
        return match[0].translate(HIDE)

    text = VERBATIM.sub(hide, text)
    text = re.sub(r'(?m)^[ \t]*%\n', '', text)
    text = re.sub(r'(\\[A-Za-z@]+)%\n[ \t]*(?=[A-Za-z])', r'\1 ', text)
    return re.sub(r'%(\n[ \t]*(?=\S))?', '', text)


def collapse(text):
    return re.sub(r'\n\s*\n', '\n\n', text)


def clean(text):
    """(What prints, why the cleaner couldn't take it if it couldn't)."""
    text = collapse(uncomment(text))
    for match in MACRO.finditer(text):
        name = match[1] or match[2]
        if not re.search(re.escape(name) + r'(?![A-Za-z])', match[3]):
            macros.setdefault(name, match[0].translate(SHOW))
    parts = CUT.split(text)
    out, why = [], ''
    for part in [part for part in parts if BEGIN.search(part)] or parts[:1]:
        part = part[max(0, part.find(r'\begin{document}')):]
        try:
            part = run_cleaner(part)
        except Exception as error:
            why = f'arxiv-latex-cleaner: {type(error).__name__}; comments stripped simply'
        out.append(part.strip('\n'))
    return collapse('\n'.join(out)).translate(SHOW).strip('\n'), why


def run_cleaner(text):
    """The cleaner's public function, on one file in a folder by itself."""
    folder = os.path.join(scratch.name, 'in')
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'paper.tex'), 'w', encoding='utf-8') as file:
        file.write(text)
    with contextlib.redirect_stderr(io.StringIO()):
        run_arxiv_cleaner(dict(
            input_folder=folder, keep_bib=False, commands_to_delete=[], images_allowlist={},
            im_size=500, pdf_im_resolution=500, resize_images=False, compress_pdf=False))
    with open(os.path.join(scratch.name, 'in_arXiv', 'paper.tex'), encoding='utf-8') as file:
        return file.read()


def without_repeats(text, seen):
    """Drop each paragraph of 100 characters or more that has been seen before."""
    kept = []
    for paragraph in text.split('\n\n'):
        if len(paragraph) < 100 or paragraph not in seen:
            kept.append(paragraph)
            seen.add(paragraph)
    return '\n\n'.join(kept)


def runs(paragraph):
    """Hashes of the runs of twelve words, white space aside."""
    words = paragraph.split()
    return [hash(tuple(words[i:i + 12])) for i in range(len(words) - 11)]


def only_new(val, train):
    """Drop each paragraph of val most of whose runs of twelve words stand in train."""
    paragraphs = val.split('\n\n')
    known = {run for paragraph in paragraphs for run in runs(paragraph)}
    known = known.intersection(run for paragraph in train.split('\n\n') for run in runs(paragraph))
    return '\n\n'.join(
        paragraph for paragraph in paragraphs
        if sum(run in known for run in runs(paragraph)) <= len(runs(paragraph)) / 2)


# -------------------------------------------------------------------------------------- measuring

def yardsticks(train, val, V):
    """Bits a token of the validation part (token ids) under three models that were counted on the
    training part, one being added to each count."""
    n, pairs = Counter(train), Counter(zip(train, train[1:]))
    followed = n - Counter(train[-1:])

    def bits(probabilities):
        return -fmean(map(math.log2, probabilities))

    return {'uniform': math.log2(V),
            'unigram': bits((n[b] + 1) / (len(train) + V) for b in val),
            'bigram': bits((pairs[a, b] + 1) / (followed[a] + V) for a, b in zip(val, val[1:]))}


def xz(train, val):
    """Bits that xz needs for the validation text after the last 4 MB of the training text."""
    before = train[-2**22:].encode()[-2**22:]
    return 8 * (len(lzma.compress(before + val.encode())) - len(lzma.compress(before)))


# ---------------------------------------------------------------------------------- the data set

PARTS = 'train.bin', 'val.bin', 'meta.json'
folder = os.path.join(data_dir, dataset)
place = os.path.realpath(folder)


def remove(path):
    """Remove a data set. A folder that holds anything else stays, and says so."""
    for name in PARTS:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(path, name))
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(path)


def put_right():
    """Undo what a swap left that was cut short, and see that there is nothing but a data set."""
    if os.path.isdir(f'{place}.old') and not os.path.exists(place):
        os.rename(f'{place}.old', place)
    for path in place, f'{place}.old', f'{place}.tmp':
        if os.path.exists(path) and not set(os.listdir(path)) <= set(PARTS):
            fail(f'{show(path)} holds more than a data set; --dataset=NAME takes another name')
    remove(f'{place}.old')
    remove(f'{place}.tmp')


def swap_in(contents):
    """Write a new folder beside the old one, and let them change places."""
    os.makedirs(f'{place}.tmp')
    for name, data in zip(PARTS, contents):
        with open(os.path.join(f'{place}.tmp', name), 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    if os.path.exists(place):
        os.rename(place, f'{place}.old')
    os.rename(f'{place}.tmp', place)
    remove(f'{place}.old')


# -------------------------------------------------------------------------------------- the script

if not os.path.isfile(source) and not os.path.isdir(source):
    fail(f'--source={show(source)}: there is no such file or folder')
try:
    put_right()
except OSError as error:
    fail(f'{show(folder)}: {error.strerror}; --data_dir=FOLDER writes elsewhere')

papers, written_in, left = [], Counter(), 0
for path, data in documents():
    text, codec = decode(data)
    text = re.sub('\r\r?\n|\r', '\n', text.rstrip('\0')).replace('\ufeff', '')
    if junk := JUNK.match(data):
        note(path, 'skipped', why=f'{junk.lastgroup}, not LaTeX')
    elif text.count('\0') > len(text) / 1000:
        note(path, 'skipped', why='not a text')
    else:
        cleaned, why = clean(text.replace('\0', ''))
        status = 'skipped' if not cleaned.strip() else 'stripped' if why else 'cleaned'
        row = note(path, status, len(text), len(cleaned), why or 'nothing is left of it')
        if cleaned.strip():
            papers.append((hashlib.sha256(cleaned.encode()).digest(), cleaned))
            written_in[codec] += 1
if not papers:
    why = f' ({sources[0]["path"]}: {sources[0]["why"]})' if sources else ''
    fail(f'--source={show(source)}: no LaTeX found{why}')

seen = set()
text = '\n'.join(without_repeats(paper, seen) for _, paper in sorted(papers))
cut = int(len(text) * (1 - val_fraction))  # as the original did
train, val = text[:cut], only_new(text[cut:], text[:cut])
left_out = len(text) - cut - len(val)
text = train + val

print(f'learning tokens from {cut:,} characters ...', flush=True)
if tokenizer_from:
    _, tokens, _ = load(tokenizer_from)
else:
    size = MAX_VOCAB if tokenizer == 'char' else vocab_size
    tokens = TOKENIZERS[tokenizer].learn(train, size)
V = len(tokens.tokens)

meta, ids = {}, {}
for name, part in ('train', train), ('val', val):
    ids[name] = array('H')
    for i, paragraph in enumerate(re.split(r'(?=\n\n)', part)):  # no token is cut here
        ids[name].extend(tokens.encode(paragraph))
        if i % 1000 == 0:
            progress(f'encoding {name}: {len(ids[name]):,} tokens')
    meta[name] = dict(characters=len(part), bytes=len(part.encode()), tokens=len(ids[name]))
    if len(ids[name]) < 3:
        fail(f'the {name} part has {len(ids[name])} tokens of {len(text)} characters in all, and '
             f'{left_out} were left out; more papers are needed, or another --val_fraction')

bits = yardsticks(ids['train'], ids['val'], V)
meta['yardsticks'] = {name: bits[name] * len(ids['val']) / len(val) for name in bits}
meta['yardsticks']['xz'] = xz(train, val) / len(val)
meta.update(tokenizer=dict(kind=tokens.kind, learned=tokens.learned), vocab_size=V,
            left_out=left_out, macros=macros, sources=sources)
try:
    swap_in([ids['train'], ids['val'], json.dumps(meta).encode()])
except OSError as error:
    remove(f'{place}.tmp')
    fail(f'{show(folder)}: {error.strerror}; --data_dir=FOLDER writes elsewhere')

count = {status: [row for row in sources if row['status'] == status]
         for status in ('cleaned', 'stripped', 'skipped')}
for status in 'stripped', 'skipped':
    for row in count[status][:10]:
        print(f'  {status}: {row["path"]} ({row["why"]})')
    if len(count[status]) > 10:
        print(f'  {status}: {len(count[status]) - 10} more, all in {show(folder)}/meta.json')
if others:
    print('not LaTeX:   ' + ', '.join(f'{n} {ending}' for ending, n in others.most_common()))
before = sum(row['characters_before'] for row in sources)
every = sum(len(part) for part in ids.values())
unknown = sum(part.count(tokens.ids.get(UNKNOWN, MAX_VOCAB)) for part in ids.values())
print(f"""read         {len(papers)} files, {len(count['skipped'])} skipped
characters   {before:,}, cleaned {len(text):,}; {len(set(text))} different ones
begins       {text[:60]!r}
tokens       {every:,} of {V:,} kinds ({tokens.kind}), {len(text) / every:.2f} characters a token
split        {len(ids['train']):,} to train, {len(ids['val']):,} to validate
left out     {left_out:,} characters at the end that stand in the training part nearly so""")
for codec in filter(None, written_in):
    print(f'written in   {codec}, at least in part: {written_in[codec]} files')
if unknown:
    print(f'unknown      {unknown:,} tokens stand for what the tokenizer does not know')
print('to be beaten ' + ', '.join(f'{name} {bits:.3f}' for name, bits in meta['yardsticks'].items())
      + ' bits per character')
again = f'python train.py --dataset={show(dataset)}'
if len(text) < SMALL and not tokenizer_from:
    print(f"""small        too little to learn a language from, but enough to finetune a model with:
             python prepare.py --source={show(source)} --dataset={show(dataset)} \
--tokenizer_from=out/ckpt.safetensors
             {again} --init_from=out/ckpt.safetensors --out_dir=finetuned""")
print(f'written      {show(folder)}; next: {again}')
