"What chapter 01's notebook cannot show: bad servers, two processes at once, processes killed, and random arrays"
import gzip, hashlib, io, os, shutil, socket, subprocess, sys, tarfile, tempfile, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import course_lib.datasets as ds
from course_lib.datasets import DataError, SOURCES, Source, download, get_data, read_idx, write_idx

ROOT = Path(__file__).resolve().parent.parent
CONTENT = np.random.default_rng(0).bytes(50_000)

def sha(content): return hashlib.sha256(content).hexdigest()

def tar(*members):
    "A .tgz of (name, content, TarInfo attributes) members"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as t:
        for name,content,attrs in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for k,v in attrs.items(): setattr(info, k, v)
            t.addfile(info, io.BytesIO(content))
    return out.getvalue()

ARCHIVE = tar(('top/train/a.txt', b'a'*3000, {}), ('top/train/b.txt', b'b'*3000, {}))

# ---- a server that misbehaves as told ----

class Server(ThreadingHTTPServer):
    "`files`: path -> (content, behavior); `asked`: the requests that came, as (path, Range, If-Range)"
    daemon_threads = True
    def __init__(self):
        self.files,self.asked,self.halfway,self.closing = {},[],threading.Event(),threading.Event()
        super().__init__(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    def put(self, path, content=CONTENT, **how): self.files['/'+path] = (content, how)
    def url(self, folder=''): return f'http://127.0.0.1:{self.server_port}/{folder}'

class Handler(BaseHTTPRequestHandler):
    """Behaviors: etag (None: no tag), ranges (understands Range), if_range (understands If-Range), cut (bytes sent
    before it hangs up), stall (bytes sent before it falls silent), silent (never answers), length (a false
    Content-Length, None: none), chunked, slow (seconds to take), status, range_reply (a false Content-Range),
    once (behave so only once, and then like this)"""
    def do_GET(self):
        wish,tag = self.headers.get('Range'), self.headers.get('If-Range')
        self.server.asked.append((self.path, wish, tag))
        if self.path not in self.server.files: return self.send_error(404)
        content,how = self.server.files[self.path]
        if how.get('once'): self.server.files[self.path] = (content, how['once'])
        if how.get('silent'): return self.server.closing.wait(20)
        if how.get('status'): return self.send_error(how['status'])
        etag = how.get('etag', f'"{sha(content)[:8]}"')
        start = int(wish.removeprefix('bytes=').removesuffix('-')) if wish and how.get('ranges', True) else 0
        if tag != etag and how.get('if_range', True): start = 0
        if start and start >= len(content): return self.send_error(416)
        body = content[start:]
        self.send_response(206 if start else 200)
        if etag: self.send_header('ETag', etag)
        reply = f'bytes {start}-{len(content)-1}/{len(content)}'
        if start: self.send_header('Content-Range', how.get('range_reply', reply))
        if how.get('chunked'): self.send_header('Transfer-Encoding', 'chunked')
        elif (length := how.get('length', len(body))) is not None: self.send_header('Content-Length', length)
        self.end_headers()
        if how.get('chunked'): body = b'%x\r\n' % len(body) + body + b'\r\n0\r\n\r\n'
        stop = how.get('cut', how.get('stall', len(body)))
        self.wfile.write(body[:stop//2])
        self.wfile.flush()
        time.sleep(how.get('slow', 0))
        self.wfile.write(body[stop//2:stop])
        self.wfile.flush()
        self.server.halfway.set()
        if 'stall' in how: self.server.closing.wait(20)
    def log_message(self, *args): "Say nothing"

@pytest.fixture
def server():
    s = Server()
    yield s
    s.closing.set()
    s.shutdown()
    s.server_close()

@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty cache, far from the real home folder and from the course's data"
    home = tmp_path/'home'
    monkeypatch.setenv('COURSE_HOME', str(home))
    monkeypatch.setenv('HOME', str(tmp_path/'nobody'))
    monkeypatch.delenv('COURSE_DATA', raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ('toy','toy_tgz'): monkeypatch.setitem(SOURCES, name, None)
    return home

def toy(server, *folders, content=CONTENT):
    "The data set `toy`, one file, with these folders of the server as mirrors"
    SOURCES['toy'] = Source('toy', {'file': sha(content)}, mirrors=tuple(server.url(f) for f in folders or ('',)))

def toy_tgz(server, content=ARCHIVE):
    SOURCES['toy_tgz'] = Source('toy_tgz', {'toy.tgz': sha(content)}, mirrors=(server.url(),), archive=True)

def left(home):
    "All there is in the cache, but for the locks, which are empty"
    if not home.exists(): return []
    return sorted(p.relative_to(home).as_posix() for p in home.rglob('*') if p.suffix != '.lock')

def get(name='toy', timeout=5): return get_data(name, timeout=timeout, progress=False)

def fails(*parts, name='toy', timeout=5):
    with pytest.raises(DataError) as e: get(name, timeout)
    for part in parts: assert part in str(e.value)
    return str(e.value)

# ---- one server ----

def test_good_file(server, home):
    server.put('file')
    toy(server)
    assert get() == home/'toy'
    assert (home/'toy'/'file').read_bytes() == CONTENT
    assert left(home) == ['toy', 'toy/file']
    assert get() == home/'toy' and len(server.asked) == 1      # the second call asks nobody

def test_good_archive(server, home):
    server.put('toy.tgz', ARCHIVE)
    toy_tgz(server)
    folder = get('toy_tgz')
    assert (folder/'train'/'a.txt').read_bytes() == b'a'*3000
    assert left(home) == ['toy_tgz', 'toy_tgz/train', 'toy_tgz/train/a.txt', 'toy_tgz/train/b.txt']
    assert get('toy_tgz') == folder and len(server.asked) == 1

@pytest.mark.parametrize('how', [dict(chunked=True), dict(length=None), dict(etag=None), dict(etag='W/"weak"')])
def test_good_in_other_ways(server, home, how):
    server.put('file', **how)
    toy(server)
    assert (get()/'file').read_bytes() == CONTENT
    assert left(home) == ['toy', 'toy/file']

@pytest.mark.parametrize('how', [dict(cut=9000), dict(chunked=True, cut=9000), dict(stall=9000), dict(stall=0)])
@pytest.mark.parametrize('name', ['file', 'toy.tgz'])
def test_truncated_or_stalled(server, home, how, name):
    "Without a tag there is nothing to go on from, so nothing is kept"
    content = dict(file=CONTENT).get(name, tar(('a', CONTENT, {})))
    server.put(name, content, etag=None, **how)
    toy(server)
    toy_tgz(server, content)
    fails('nothing came for 0.3 s' if 'stall' in how else name, name='toy' if name=='file' else 'toy_tgz', timeout=0.3)
    assert left(home) == []

def test_no_length_truncated(server, home):
    server.put('file', length=None, cut=9000)
    toy(server)
    fails('has SHA-256')
    assert left(home) == []

def test_silent_server(server, home):
    server.put('file', silent=True)
    toy(server)
    fails('nothing came for 0.3 s', timeout=0.3)
    assert left(home) == []

@pytest.mark.parametrize('content', [CONTENT[:-1], CONTENT[:-1]+b'?', b'', b'<html>Please log in</html>'])
def test_wrong_hash(server, home, content):
    server.put('file', content)
    toy(server)
    fails(sha(CONTENT)[:12], sha(content)[:12])
    assert left(home) == []

def test_truncated_archive(server, home):
    server.put('toy.tgz', ARCHIVE[:-100])
    toy_tgz(server)
    fails('has SHA-256', name='toy_tgz')
    assert left(home) == []

@pytest.mark.parametrize('status', [403, 404, 500, 503])
def test_refused(server, home, status):
    server.put('file', status=status)
    toy(server)
    fails(f'{status}', server.url('file'))
    assert left(home) == []

def test_gzip_is_hashed_inside(server, home):
    mirrors = tuple(server.url(o) for o in ('bad','cut','good'))
    SOURCES['toy'] = Source('toy', {'file.gz': sha(CONTENT)}, mirrors=mirrors)
    server.put('bad/file.gz', gzip.compress(CONTENT[:-1]))
    server.put('cut/file.gz', gzip.compress(CONTENT)[:-5])
    server.put('good/file.gz', gzip.compress(CONTENT, 1))
    assert gzip.decompress((get()/'file.gz').read_bytes()) == CONTENT
    assert [path for path,*_ in server.asked] == ['/bad/file.gz', '/cut/file.gz', '/good/file.gz']
    assert left(home) == ['toy', 'toy/file.gz']

# ---- mirrors ----

def test_mirror_down_next_good(server, home):
    with socket.socket() as s:      # a port where nobody listens
        s.bind(('127.0.0.1', 0))
        closed = f'http://127.0.0.1:{s.getsockname()[1]}'
    server.put('good/file')
    SOURCES['toy'] = Source('toy', {'file': sha(CONTENT)}, mirrors=(closed, server.url('good')))
    assert (get()/'file').read_bytes() == CONTENT
    assert left(home) == ['toy', 'toy/file']

def test_all_kinds_of_bad_mirrors_then_good(server, home):
    server.put('wrong/file', b'wrong')
    server.put('cut/file', cut=20_000, ranges=False)
    server.put('stall/file', stall=30_000, ranges=False)
    server.put('good/file')
    toy(server, 'missing', 'wrong', 'cut', 'stall', 'good')
    assert (get(timeout=1)/'file').read_bytes() == CONTENT
    assert left(home) == ['toy', 'toy/file']

def test_all_mirrors_are_named(server, home):
    server.put('wrong/file', b'wrong')
    toy(server, 'missing', 'wrong')
    fails(server.url('missing/file'), '404', server.url('wrong/file'), 'has SHA-256')
    assert left(home) == []

# ---- going on after an interruption ----

def interrupt(server, home, **how):
    "Let a download break off after 20,000 bytes"
    server.put('file', cut=20_000, once=dict(status=503), **how)
    toy(server)
    fails('503', 'the first 20,000 bytes are in')
    assert left(home) == ['toy.part', 'toy.part/file.part', 'toy.part/file.part.tag']
    server.asked.clear()

def test_resume(server, home):
    interrupt(server, home)
    server.put('file')
    assert (get()/'file').read_bytes() == CONTENT
    assert server.asked == [('/file', 'bytes=20000-', f'"{sha(CONTENT)[:8]}"')]
    assert left(home) == ['toy', 'toy/file']

def test_resume_within_one_call(server, home):
    server.put('file', cut=20_000)
    toy(server)
    assert (get()/'file').read_bytes() == CONTENT
    assert [wish for _,wish,_ in server.asked] == [None, 'bytes=20000-', 'bytes=40000-']

def test_resume_ignored_by_server(server, home):
    interrupt(server, home)
    server.put('file', ranges=False)
    assert (get()/'file').read_bytes() == CONTENT
    assert len(server.asked) == 1 and left(home) == ['toy', 'toy/file']

def test_file_changed_meanwhile(server, home):
    interrupt(server, home)
    new = bytes(reversed(CONTENT))
    server.put('file', new)
    toy(server, content=new)
    assert (get()/'file').read_bytes() == new
    assert len(server.asked) == 1

def test_file_changed_meanwhile_and_server_ignores_if_range(server, home):
    interrupt(server, home)
    new = bytes(reversed(CONTENT))
    server.put('file', new, if_range=False)
    toy(server, content=new)
    assert (get()/'file').read_bytes() == new
    assert [wish for _,wish,_ in server.asked] == ['bytes=20000-', None]     # the pieces did not fit

@pytest.mark.parametrize('reply', ['bytes 7-49999/50000', ''])
def test_false_range(server, home, reply):
    "A server that sends another part than was asked for is not believed; the next mirror is"
    interrupt(server, home)
    server.put('file', range_reply=reply)
    server.put('good/file')
    toy(server, '', 'good')
    assert (get()/'file').read_bytes() == CONTENT

def test_part_is_longer_than_file(server, home):
    interrupt(server, home)
    new = CONTENT[:10_000]
    server.put('file', new, if_range=False)
    toy(server, content=new)
    assert (get()/'file').read_bytes() == new
    assert left(home) == ['toy', 'toy/file']

def test_damaged_part(server, home):
    interrupt(server, home)
    (home/'toy.part'/'file.part').write_bytes(bytes(20_000))
    server.put('file')
    assert (get()/'file').read_bytes() == CONTENT

def test_finished_files_are_kept(server, home):
    SOURCES['toy'] = Source('toy', {'one': sha(CONTENT), 'two': sha(ARCHIVE)}, mirrors=(server.url(),))
    server.put('one')
    fails('two', '404')
    assert left(home) == ['toy.part', 'toy.part/one']      # whole and verified, in a folder that nobody reads
    server.put('two', ARCHIVE)
    get()
    assert [path for path,*_ in server.asked] == ['/one', '/two', '/two']
    assert left(home) == ['toy', 'toy/one', 'toy/two']

# ---- archives that mean harm ----

LINK,HARD = dict(type=tarfile.SYMTYPE), dict(type=tarfile.LNKTYPE)
@pytest.mark.parametrize('members', [
    [('../evil', b'evil', {})],
    [('top/../../evil', b'evil', {})],
    [('/tmp/evil_course_lib', b'evil', {})],
    [('..\\evil', b'evil', {})],
    [('C:\\evil', b'evil', {})],
    [('link', b'', dict(LINK, linkname='..')), ('link/evil', b'evil', {})],
    [('link', b'', dict(LINK, linkname='/tmp'))],
    [('a/b/here', b'', dict(LINK, linkname='../..')), ('out', b'', dict(LINK, linkname='a/b/here/..')),
     ('out/evil', b'evil', {})],
    [('link', b'', dict(HARD, linkname='../../secret'))],
    [('device', b'', dict(type=tarfile.CHRTYPE, devmajor=1, devminor=3))],
    [('pipe', b'', dict(type=tarfile.FIFOTYPE))],
], ids=lambda m: m[0][0])
def test_unsafe_archive(server, home, tmp_path, members):
    content = tar(('fine.txt', b'fine', {}), *members)
    server.put('toy.tgz', content)
    toy_tgz(server, content)
    fails('toy.tgz is not unpacked', name='toy_tgz')
    assert left(home) == []
    assert not list(tmp_path.rglob('*evil*')) and not Path('/tmp/evil_course_lib').exists()

def test_not_an_archive(server, home):
    server.put('toy.tgz', CONTENT)      # the hash is right, but it is no archive
    toy_tgz(server, CONTENT)
    fails('cannot be unpacked', name='toy_tgz')
    assert left(home) == []

def test_archive_found_locally(server, home, tmp_path, monkeypatch):
    toy_tgz(server)
    (tmp_path/'mine'/'toy_tgz').mkdir(parents=True)
    (tmp_path/'mine'/'toy_tgz'/'toy.tgz').write_bytes(ARCHIVE)
    monkeypatch.setenv('COURSE_DATA', str(tmp_path/'mine'))
    assert get('toy_tgz') == home/'toy_tgz' and not server.asked
    assert left(home) == ['toy_tgz', 'toy_tgz/train', 'toy_tgz/train/a.txt', 'toy_tgz/train/b.txt']

# ---- where to look ----

def test_order_of_places(server, home, tmp_path, monkeypatch):
    "$COURSE_DATA, then data/ here or above, then the cache, then the system, then the network"
    toy(server)
    SOURCES['toy'].system = (tmp_path/'system',)
    server.put('file')
    work = tmp_path/'deep'/'down'
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv('COURSE_DATA', str(tmp_path/'mine'))
    places = [tmp_path/'mine'/'toy', tmp_path/'data'/'toy', home/'toy', tmp_path/'system']
    for p in places:
        p.mkdir(parents=True)
        (p/'file').write_bytes(CONTENT)
    for p in places:
        assert get() == p
        shutil.rmtree(p)
    assert not server.asked
    assert get() == home/'toy' and len(server.asked) == 1

def test_course_data_is_misspelt(server, home, tmp_path, monkeypatch):
    server.put('file')
    toy(server)
    monkeypatch.setenv('COURSE_DATA', str(tmp_path/'mien'))
    with pytest.warns(UserWarning, match='COURSE_DATA is .*mien, but there is no'): assert get() == home/'toy'

def test_wrong_local_file_is_never_used(server, home, tmp_path, monkeypatch):
    toy(server)
    mine = tmp_path/'mine'/'toy'
    mine.mkdir(parents=True)
    (mine/'file').write_bytes(CONTENT[:-1])
    monkeypatch.setenv('COURSE_DATA', str(mine.parent))
    with pytest.warns(UserWarning, match='left aside: file has SHA-256'): fails('404')
    server.put('file')
    with pytest.warns(UserWarning, match='left aside'): assert get() == home/'toy'
    assert (mine/'file').read_bytes() == CONTENT[:-1]      # not ours to change

def test_folder_that_lacks_a_file(server, home, tmp_path, monkeypatch):
    SOURCES['toy'] = Source('toy', {'one': sha(CONTENT), 'two': sha(ARCHIVE)}, mirrors=(server.url(),))
    (tmp_path/'data'/'toy').mkdir(parents=True)
    (tmp_path/'data'/'toy'/'one').write_bytes(CONTENT)
    server.put('one')
    server.put('two', ARCHIVE)
    with pytest.warns(UserWarning, match='two is damaged or cannot be read'): assert get() == home/'toy'

def test_damaged_cache_is_mended(server, home):
    server.put('file')
    toy(server)
    get()
    (home/'toy'/'file').write_bytes(b'damaged')
    with pytest.warns(UserWarning, match='left aside'): assert get() == home/'toy'
    assert (home/'toy'/'file').read_bytes() == CONTENT and left(home) == ['toy', 'toy/file']

def test_made_data(home):
    calls = []
    def make(folder):
        calls.append(folder)
        if len(calls) == 1:
            (folder/'half').write_bytes(b'')
            raise RuntimeError('something broke')
        for name in 'ab': (folder/name).write_bytes(b'')
    SOURCES['toy'] = Source('toy', {}, make=make, n_files=2)
    with pytest.raises(RuntimeError): get()
    assert left(home) == []
    assert get() == get() == home/'toy' and len(calls) == 2
    (home/'toy'/'a').unlink()
    with pytest.warns(UserWarning, match='has 1 files instead of 2'): get()
    assert left(home) == ['toy', 'toy/a', 'toy/b']

def test_progress_bar(server, home, capsys):
    server.put('file')
    toy(server)
    get_data('toy')
    assert 'file: 100%' in capsys.readouterr().err

# ---- the disk ----

def test_cache_is_inside_a_file(server, home, tmp_path, monkeypatch):
    (tmp_path/'file').write_bytes(b'')
    monkeypatch.setenv('COURSE_HOME', str(tmp_path/'file'/'cache'))
    server.put('file')
    toy(server)
    fails('cannot write in', 'COURSE_HOME')
    assert not server.asked

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write anywhere')
def test_cache_is_read_only(server, home):
    home.mkdir()
    home.chmod(0o500)
    server.put('file')
    toy(server)
    try: fails('cannot write in', 'COURSE_HOME')
    finally: home.chmod(0o700)
    assert left(home) == [] and not server.asked

def test_no_room(server, home, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10, 9, 1))
    server.put('file')
    toy(server)
    fails('0 MiB free', 'COURSE_HOME')
    assert left(home) == []

def test_disk_gets_full(server, home):
    "The operating system refuses to let a file grow beyond 20,000 bytes: what a full disk looks like to us"
    resource = pytest.importorskip('resource')
    server.put('file')
    toy(server)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try: message = fails('cannot write in', 'COURSE_HOME')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left(home) == [], message
    assert (get()/'file').read_bytes() == CONTENT

def test_download_by_itself(server, tmp_path):
    server.put('file')
    path = download([server.url('file')], tmp_path/'new'/'file', sha(CONTENT), progress=False)
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ['file']

# ---- several processes ----

PROGRAM = """
import sys, time
from course_lib.datasets import SOURCES, Source, get_data
def make(folder):
    (folder/'a').write_text('a')
    print('making', flush=True)
    time.sleep(float(sys.argv[2]))
    (folder/'b').write_text('b')
if sys.argv[1]: SOURCES['toy'] = Source('toy', {'file': sys.argv[2]}, mirrors=(sys.argv[1],))
else: SOURCES['toy'] = Source('toy', {}, make=make, n_files=2)
print('ready', flush=True)
sys.stdin.readline()
print(get_data('toy', progress=False), flush=True)
"""

@pytest.fixture
def start():
    processes = []
    def start(*args):
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
        p = subprocess.Popen([sys.executable, '-c', PROGRAM, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True, env=env)
        processes.append(p)
        return p
    yield start
    for p in processes:
        if p.poll() is None: p.kill()
        p.communicate()

def go(*processes):
    "Wait until all are ready, and let them begin together"
    for p in processes: assert p.stdout.readline() == 'ready\n'
    for p in processes:
        p.stdin.write('\n')
        p.stdin.flush()

def test_two_processes_at_once(server, home, start):
    server.put('file', slow=0.5)
    ps = [start(server.url(), sha(CONTENT)) for _ in range(2)]
    go(*ps)
    for p in ps: assert p.communicate()[0].strip() == str(home/'toy') and p.returncode == 0
    assert len(server.asked) == 1       # the second one waited, and found the work done
    assert left(home) == ['toy', 'toy/file'] and (home/'toy'/'file').read_bytes() == CONTENT

def test_killed_while_downloading(server, home, start):
    server.put('file', stall=20_000)
    p = start(server.url(), sha(CONTENT))
    go(p)
    assert server.halfway.wait(20)
    part = home/'toy.part'/'file.part'
    while p.poll() is None and not (part.exists() and part.stat().st_size): time.sleep(0.01)
    assert p.poll() is None
    p.kill()
    p.wait()
    assert not (home/'toy').exists()
    server.put('file')
    toy(server)
    assert (get()/'file').read_bytes() == CONTENT       # nobody waits for the dead process's lock
    assert left(home) == ['toy', 'toy/file']

def test_killed_while_making(home, start):
    p = start('', '60')
    go(p)
    assert p.stdout.readline() == 'making\n'
    p.kill()
    p.wait()
    assert not (home/'toy').exists()
    p = start('', '0')
    go(p)
    assert p.communicate()[0].split()[-1] == str(home/'toy') and left(home) == ['toy', 'toy/a', 'toy/b']

# ---- the real data ----

def test_sha256sums_agree():
    sums = dict(reversed(line.split()) for line in (ROOT/'data'/'SHA256SUMS').read_text(encoding='utf-8').splitlines())
    ours = {f"{s.name}/{f.removesuffix('.gz')}": sha for s in (SOURCES['mnist'], SOURCES['fashion_mnist'])
            for f,sha in s.files.items()}
    assert sums == ours
    for name in sums: assert (ROOT/'data'/f'{name}.gz').exists()
    for name in ('mnist','fashion_mnist'): assert (ROOT/'data'/name/'LICENSE').exists()

def test_mnist_sample_is_made_once(home):
    path = ds.mnist_sample()
    assert path == home/'mnist_sample' and os.listdir(home/'mnist_sample') and not (home/'mnist_sample.part').exists()
    before = (path/'train'/'3'/'10.png').stat().st_mtime_ns
    (x,y),_ = ds.mnist()
    for part,c,n in [('train','3',6131), ('train','7',6265), ('valid','3',1010), ('valid','7',1028)]:
        files = ds.get_image_files(path/part/c)
        assert len(files) == n and files == sorted(files, key=str)
    assert torch.equal(ds.stack_images(files[:1])[0]*255, ds.mnist()[1][0][int(files[0].stem)].float())
    assert ds.mnist_sample() == path and (path/'train'/'3'/'10.png').stat().st_mtime_ns == before

# ---- IDX files ----

FOLDER = tempfile.TemporaryDirectory()
FILE = Path(FOLDER.name)/'a.idx'
# small numbers, so that the pixels can be mistaken for lengths of axes
shapes = array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=6)
uint8 = arrays(np.uint8, shapes, elements=st.integers(0,8) | st.integers(0,255))

calm = settings(deadline=None)      # how long an example takes is no matter

@calm
@given(uint8, st.sampled_from(['a.idx', 'a.idx.gz']))
def test_idx_comes_back(a, name):
    path = Path(FOLDER.name)/name
    write_idx(path, a)
    back = read_idx(path)
    assert back.dtype == torch.uint8 and tuple(back.shape) == a.shape and np.array_equal(back.numpy(), a)
    write_idx(path, back)
    assert torch.equal(read_idx(path), back)

@calm
@given(uint8, st.data())
def test_changed_header_is_refused(a, data):
    write_idx(FILE, a)
    raw = bytearray(FILE.read_bytes())
    raw[data.draw(st.integers(0, 3 + 4*a.ndim))] ^= data.draw(st.integers(1,255))
    FILE.write_bytes(raw)
    with pytest.raises(DataError): read_idx(FILE)

@pytest.mark.parametrize('fill', [0, 1, 2])
def test_every_changed_header_byte_is_refused(fill):
    "Each value of each byte, for small shapes filled with numbers that look like lengths"
    for shape in [(), (4,), (8,), (12,), (2,2), (1,4), (4,4), (2,2,2), (1,1,4), (1,2,2,1)]:
        write_idx(FILE, np.full(shape, fill, np.uint8))
        raw = bytearray(FILE.read_bytes())
        start = 4 + 4*len(shape)
        assert ds._header(raw) == (shape, start)
        for i,flip in product(range(start), range(1,256)):
            raw[i] ^= flip
            with pytest.raises(DataError): ds._header(raw)
            raw[i] ^= flip

@calm
@given(uint8, st.integers(1,40))
def test_cut_or_padded_is_refused(a, n):
    write_idx(FILE, a)
    raw = FILE.read_bytes()
    for bad in (raw[:-n], raw + bytes(n)):
        FILE.write_bytes(bad)
        with pytest.raises(DataError): read_idx(FILE)

@calm
@given(array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=3).filter(lambda s: 0 in s))
def test_empty_arrays_are_refused(shape):
    "A length of 0 would let a changed header pass: the product stays 0"
    FILE.unlink(missing_ok=True)
    with pytest.raises(ValueError, match='length 0'): write_idx(FILE, np.zeros(shape, np.uint8))
    assert not FILE.exists()

@pytest.mark.parametrize('dtype', [np.int8, np.uint16, np.int64, np.float32, bool])
def test_other_types_are_refused(dtype):
    with pytest.raises(TypeError, match='uint8'): write_idx(FILE, np.zeros(3, dtype))
