"What chapter 01's notebook cannot show: bad servers, two processes at once, processes killed, odd files, and random arrays"
import gzip, hashlib, io, os, shutil, socket, struct, subprocess, sys, tarfile, tempfile, threading, time, tracemalloc, warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, ImageOps

import course_lib.datasets as ds
from course_lib.datasets import (DataError, SOURCES, Source, convert_image, download, get_data, get_image_files, read_idx,
                                 save_images, stack_images, unpack, write_idx)

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
    "`files`: path -> (content, behavior); `asked`: the paths that were asked for"
    daemon_threads = True
    def __init__(self):
        self.files,self.asked,self.halfway,self.closing = {},[],threading.Event(),threading.Event()
        super().__init__(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    def put(self, path, content=CONTENT, **how): self.files['/'+path] = (content, how)
    def url(self, folder=''): return f'http://127.0.0.1:{self.server_port}/{folder}'

class Handler(BaseHTTPRequestHandler):
    """Behaviors: cut (bytes sent before it hangs up), stall (bytes sent before it falls silent), silent (never answers),
    length (a false Content-Length, None: none), chunked, slow (seconds to take), status, location, answer (bytes to send
    in place of all that)"""
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path not in self.server.files: return self.send_error(404)
        content,how = self.server.files[self.path]
        if how.get('silent'): return self.server.closing.wait(20)
        if 'answer' in how: return self.wfile.write(how['answer'])
        if how.get('status'): return self.send_error(how['status'])
        self.send_response(302 if 'location' in how else 200)
        if 'location' in how: self.send_header('Location', how['location'])
        if how.get('chunked'): self.send_header('Transfer-Encoding', 'chunked')
        elif (length := how.get('length', len(content))) is not None: self.send_header('Content-Length', length)
        self.end_headers()
        body = b'%x\r\n' % len(content) + content + b'\r\n0\r\n\r\n' if how.get('chunked') else content
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
    "All there is in the cache, but for the locks and the lists of what was made"
    if not home.exists(): return []
    return sorted(p.relative_to(home).as_posix() for p in home.rglob('*') if p.suffix not in ('.lock', '.files'))

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

@pytest.mark.parametrize('how', [dict(chunked=True), dict(length=None), dict(location='/other')])
def test_good_in_other_ways(server, home, how):
    server.put('file', **how)
    server.put('other')
    toy(server)
    assert (get()/'file').read_bytes() == CONTENT
    assert left(home) == ['toy', 'toy/file']

@pytest.mark.parametrize('how', [dict(cut=9000), dict(chunked=True, cut=9000), dict(stall=9000), dict(stall=0)])
@pytest.mark.parametrize('name', ['file', 'toy.tgz'])
def test_truncated_or_stalled(server, home, how, name):
    content = dict(file=CONTENT).get(name, tar(('a', CONTENT, {})))
    server.put(name, content, **how)
    toy(server)
    toy_tgz(server, content)
    fails('timed out' if 'stall' in how else name, name='toy' if name=='file' else 'toy_tgz', timeout=0.3)
    assert left(home) == []

def test_no_length_truncated(server, home):
    server.put('file', length=None, cut=9000)
    toy(server)
    fails('has SHA-256')
    assert left(home) == []

def test_silent_server(server, home):
    server.put('file', silent=True)
    toy(server)
    fails('timed out', timeout=0.3)
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
    assert server.asked == ['/bad/file.gz', '/cut/file.gz', '/good/file.gz']
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
    server.put('cut/file', cut=20_000)
    server.put('stall/file', stall=30_000)
    server.put('good/file')
    toy(server, 'missing', 'wrong', 'cut', 'stall', 'good')
    assert (get(timeout=1)/'file').read_bytes() == CONTENT
    assert left(home) == ['toy', 'toy/file']

def test_all_mirrors_are_named(server, home):
    server.put('wrong/file', b'wrong')
    toy(server, 'missing', 'wrong')
    fails(server.url('missing/file'), '404', server.url('wrong/file'), 'has SHA-256')
    assert left(home) == []

ODD_ANSWERS = dict(nothing=b'', no_http=b'SSH-2.0-OpenSSH\r\n', no_status=b'HTTP/1.1 \r\n\r\n', no_number=b'HTTP/1.1 OK 200\r\n\r\n',
    long_header=b'HTTP/1.1 200 OK\r\nX: ' + b'x'*100_000, bad_chunk=b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab',
    bad_length=b'HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc', minus=b'HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc',
    loop=b'HTTP/1.1 302 Found\r\nLocation: /loop/file\r\n\r\n', to_file=b'HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n',
    nowhere=b'HTTP/1.1 302 Found\r\nLocation: http://[::1/\r\n\r\n', no_ascii='HTTP/1.1 302 Found\r\nLocation: http://é\xad.\u00df..de/ü\r\n\r\n'.encode())
@pytest.mark.parametrize('odd', ODD_ANSWERS)
def test_any_odd_answer_means_the_next_mirror(server, home, odd):
    server.put(f'{odd}/file', answer=ODD_ANSWERS[odd])
    server.put('good/file')
    toy(server, odd, 'good')
    assert (get(timeout=2)/'file').read_bytes() == CONTENT and left(home) == ['toy', 'toy/file']

@pytest.mark.parametrize('url', ['', 'file', 'no-such-scheme://x/file', 'http://', 'http://[::1/file', 'http://127.0.0.1:port/file',
                                 'http://127.0.0.1:99999/file', 'http://a b/file', 'http://é\ud800/file', 'file:///', 'data:nonsense'])
def test_any_odd_address_means_the_next_mirror(server, tmp_path, url):
    server.put('file')
    path = download([url, server.url('file')], tmp_path/'file', sha(CONTENT), timeout=2, progress=False)
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path) == ['file']

def test_one_address_may_be_a_text(server, tmp_path):
    server.put('file')
    assert download(server.url('file'), tmp_path/'file', sha(CONTENT).upper(), progress=False).read_bytes() == CONTENT

def test_a_proxy_that_is_set_after_a_failure_is_used(server, home, monkeypatch):
    for o in ('no_proxy', 'NO_PROXY', 'http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'): monkeypatch.delenv(o, raising=False)
    with socket.socket() as s:      # a port where nobody listens
        s.bind(('127.0.0.1', 0))
        closed = f'http://127.0.0.1:{s.getsockname()[1]}/'
    SOURCES['toy'] = Source('toy', {'file': sha(CONTENT)}, mirrors=(closed,))
    fails('refused')
    server.files[f'{closed}file'] = (CONTENT, {})      # a proxy is asked for the whole address
    monkeypatch.setenv('http_proxy', server.url())
    assert (get()/'file').read_bytes() == CONTENT and server.asked == [f'{closed}file']

def test_an_old_file_stays_if_nothing_better_comes(server, tmp_path):
    (tmp_path/'file').write_bytes(b'old')
    with pytest.raises(DataError): download([server.url('file')], tmp_path/'file', sha(CONTENT), progress=False)
    assert (tmp_path/'file').read_bytes() == b'old' and os.listdir(tmp_path) == ['file']

def test_finished_files_are_kept(server, home):
    SOURCES['toy'] = Source('toy', {'one': sha(CONTENT), 'two': sha(ARCHIVE)}, mirrors=(server.url(),))
    server.put('one')
    fails('two', '404')
    assert left(home) == ['toy', 'toy/one']        # whole and right, in a folder that is not given out yet
    server.put('two', ARCHIVE)
    with pytest.warns(UserWarning, match='left aside: two is missing'): assert get() == home/'toy'
    assert server.asked == ['/one', '/two', '/two']
    assert left(home) == ['toy', 'toy/one', 'toy/two']

# ---- archives that mean harm ----

LINK,HARD = dict(type=tarfile.SYMTYPE), dict(type=tarfile.LNKTYPE)
@pytest.mark.parametrize('members', [
    [('../evil', b'evil', {})],
    [('top/../../evil', b'evil', {})],
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
    assert not list(tmp_path.rglob('*evil*'))

@pytest.mark.parametrize('name', ['/tmp/evil_course_lib', '..\\evil', 'C:\\evil'])
def test_odd_names_in_an_archive_stay_within_the_folder(tmp_path, name):
    (tmp_path/'a.tgz').write_bytes(tar((name, b'evil', {})))
    (tmp_path/'in').mkdir()
    try: unpack(tmp_path/'a.tgz', tmp_path/'in')
    except DataError: assert os.name=='nt'
    evil = [o for o in tmp_path.rglob('*evil*')] + list(Path('/tmp').glob('evil_course_lib'))
    assert all(o.is_relative_to(tmp_path/'in') for o in evil)

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
    with pytest.warns(UserWarning, match='two is missing'): assert get() == home/'toy'

def test_damaged_cache_is_mended(server, home, monkeypatch):
    "It is hashed once, and warned about once"
    server.put('file')
    toy(server)
    get()
    (home/'toy'/'file').write_bytes(b'damaged')
    hashed,file_hash = [],ds.file_hash
    monkeypatch.setattr(ds, 'file_hash', lambda path: hashed.append(Path(path)) or file_hash(path))
    with pytest.warns(UserWarning, match='left aside') as said: assert get() == home/'toy'
    assert (home/'toy'/'file').read_bytes() == CONTENT and left(home) == ['toy', 'toy/file']
    assert len(said) == 1 and hashed.count(home/'toy'/'file') == 1

def make_two(folder):
    for name in 'ab': (folder/name).write_bytes(b'')

def test_made_data(home):
    calls = []
    def make(folder):
        calls.append(folder)
        if len(calls) == 1:
            (folder/'half').write_bytes(b'')
            raise RuntimeError('something broke')
        make_two(folder)
    SOURCES['toy'] = Source('toy', {}, make=make, n_files=2)
    with pytest.raises(RuntimeError): get()
    assert left(home) == []
    assert get() == get() == home/'toy' and len(calls) == 2
    (home/'toy'/'a').unlink()
    with pytest.warns(UserWarning, match='has 1 files instead of 2'): get()
    assert left(home) == ['toy', 'toy/a', 'toy/b']
    shutil.rmtree(home/'toy')
    assert get() == home/'toy' and left(home) == ['toy', 'toy/a', 'toy/b']

def test_made_data_of_another_number_are_refused(home):
    SOURCES['toy'] = Source('toy', {}, make=make_two, n_files=3)
    fails('2 files came, but 3 are wanted')
    fails('2 files came, but 3 are wanted')      # and not given out the next time either

@pytest.mark.parametrize('error', [FileNotFoundError(2, 'No such file or directory', 'mine'), PermissionError('mine'), OSError('mine')])
def test_an_error_of_make_is_its_own(home, error):
    def make(folder): raise error
    SOURCES['toy'] = Source('toy', {}, make=make)
    with pytest.raises(type(error)) as e: get()
    assert e.value is error and left(home) == []

@pytest.mark.parametrize('name', ['.DS_Store', 'mine.txt', 'deep/down.txt'])
@pytest.mark.parametrize('kind', ['plain', 'archive', 'made'])
def test_files_of_others_stay_and_do_no_harm(server, home, kind, name):
    server.put('file')
    server.put('toy.tgz', ARCHIVE)
    toy(server)
    toy_tgz(server)
    if kind=='made': SOURCES['toy'] = Source('toy', {}, make=make_two, n_files=2)
    toys = 'toy_tgz' if kind=='archive' else 'toy'
    ours = {'plain': 'file', 'archive': 'train/a.txt', 'made': 'a'}[kind]
    mine = get(toys)/name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text('mine')
    before = left(home)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert get(toys) == home/toys and left(home) == before
    (home/toys/ours).unlink()       # what is missing is noticed, whatever else is there
    with warnings.catch_warnings(record=True): assert get(toys) == home/toys
    assert left(home) == before and mine.read_text() == 'mine'

def test_what_is_in_the_way_is_not_removed(server, home):
    server.put('file')
    toy(server)
    home.mkdir()
    (home/'toy').write_text('mine')
    with pytest.raises(OSError): get()
    assert (home/'toy').read_text() == 'mine' and left(home) == ['toy']

@pytest.mark.parametrize('kind', ['plain', 'made'])
def test_a_linked_folder_is_filled_and_kept(server, home, tmp_path, kind):
    server.put('file')
    toy(server)
    if kind=='made': SOURCES['toy'] = Source('toy', {}, make=make_two)
    (tmp_path/'disk').mkdir()
    home.mkdir()
    (home/'toy').symlink_to(tmp_path/'disk')
    assert get() == home/'toy' == get() and (home/'toy').is_symlink()
    assert sorted(os.listdir(tmp_path/'disk')) == (['file'] if kind=='plain' else ['a', 'b'])

# ---- no home, no folder, no permission ----

@pytest.fixture
def nobody(home, monkeypatch):
    "A user without a home folder"
    pwd = pytest.importorskip('pwd')
    def unknown(uid): raise KeyError(uid)
    monkeypatch.setattr(pwd, 'getpwuid', unknown)
    for o in ('HOME', 'COURSE_HOME'): monkeypatch.delenv(o)

def test_no_home(server, nobody, tmp_path, monkeypatch):
    toy(server)
    server.put('file')
    fails('COURSE_HOME')
    SOURCES['toy_tgz'] = Source('toy_tgz', {}, make=make_two)
    fails('COURSE_HOME', name='toy_tgz')
    monkeypatch.setenv('COURSE_DATA', '~/data')
    with pytest.warns(UserWarning, match='no such folder'): fails('COURSE_HOME')
    monkeypatch.delenv('COURSE_DATA')
    (tmp_path/'data'/'toy').mkdir(parents=True)
    (tmp_path/'data'/'toy'/'file').write_bytes(CONTENT)
    assert get() == tmp_path/'data'/'toy'          # none is needed where the data are at hand
    assert not list(tmp_path.glob('~*'))

def test_deleted_working_folder(server, home, tmp_path, monkeypatch):
    server.put('file')
    toy(server)
    (tmp_path/'gone').mkdir()
    monkeypatch.chdir(tmp_path/'gone')
    try: (tmp_path/'gone').rmdir()
    except OSError: pytest.skip('this system keeps a folder that is in use')
    assert get() == home/'toy' and (home/'toy'/'file').read_bytes() == CONTENT

rootless = pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read and write anywhere')

@rootless
@pytest.mark.parametrize('what', ['mine', 'mine/toy', 'mine/toy/file'])
def test_place_that_cannot_be_read(server, home, tmp_path, monkeypatch, what):
    server.put('file')
    toy(server)
    (tmp_path/'mine'/'toy').mkdir(parents=True)
    (tmp_path/'mine'/'toy'/'file').write_bytes(CONTENT)
    monkeypatch.setenv('COURSE_DATA', str(tmp_path/'mine'))
    (tmp_path/what).chmod(0)
    try:
        with warnings.catch_warnings(record=True): assert get() == home/'toy'
    finally: (tmp_path/what).chmod(0o700)

@rootless
def test_good_cache_that_is_read_only(server, home):
    server.put('file')
    toy(server)
    SOURCES['toy_tgz'] = Source('toy_tgz', {}, make=make_two)
    for name in ('toy', 'toy_tgz'): get(name)
    home.chmod(0o500)
    try: assert (get(), get('toy_tgz')) == (home/'toy', home/'toy_tgz')
    finally: home.chmod(0o700)

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

@rootless
def test_cache_is_read_only(server, home):
    home.mkdir()
    home.chmod(0o500)
    server.put('file')
    toy(server)
    try: fails('cannot write in', 'COURSE_HOME')
    finally: home.chmod(0o700)
    assert left(home) == [] and not server.asked

def test_disk_gets_full(server, home):
    "The operating system refuses to let a file grow beyond 20,000 bytes: what a full disk looks like to us"
    resource = pytest.importorskip('resource')
    server.put('file')
    toy(server)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try: message = fails('File too large', str(home), 'COURSE_HOME')
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
    def start(*args, program=PROGRAM):
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
        p = subprocess.Popen([sys.executable, '-c', program, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
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

TWICE = """
import sys
from course_lib.datasets import download
print('ready', flush=True)
sys.stdin.readline()
for _ in range(40): download([sys.argv[1]], sys.argv[3], sys.argv[2], progress=False)
print('done')
"""
def test_two_processes_download_to_one_path(start, tmp_path):
    (tmp_path/'from').write_bytes(CONTENT)
    (tmp_path/'to').mkdir()
    ps = [start((tmp_path/'from').as_uri(), sha(CONTENT), str(tmp_path/'to'/'file'), program=TWICE) for _ in range(2)]
    go(*ps)
    for p in ps: assert p.communicate()[0] == 'done\n' and p.returncode == 0
    assert os.listdir(tmp_path/'to') == ['file'] and (tmp_path/'to'/'file').read_bytes() == CONTENT

def test_killed_while_downloading(server, home, start):
    server.put('file', stall=20_000)
    p = start(server.url(), sha(CONTENT))
    go(p)
    assert server.halfway.wait(20)
    while p.poll() is None and not list((home/'toy.part').rglob('*-file')): time.sleep(0.01)
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
        assert ds._idx(io.BytesIO(raw)) == (shape, raw[4 + 4*len(shape):])
        for i,flip in product(range(4 + 4*len(shape)), range(1,256)):
            raw[i] ^= flip
            with pytest.raises(DataError): ds._idx(io.BytesIO(raw))
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

def peak(f):
    "The most memory that `f` took, in bytes"
    tracemalloc.start()
    try:
        with pytest.raises(DataError): f()
        return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()

@pytest.mark.parametrize('zipped', [True, False])
def test_a_bomb_is_stopped_by_the_size_in_the_header(zipped):
    "100 MB after the header of three images; and a header that promises 2 EB, in front of three"
    header,size = b'\0\0\x08\3' + struct.pack('>3I', 3, 28, 28), 3*28*28
    for content in (header + bytes(100_000_000), header[:4] + b'\x7f\xff\xff\xff'*2 + header[12:] + bytes(size)):
        FILE.write_bytes(gzip.compress(content, 1) if zipped else content)
        assert peak(lambda: read_idx(FILE)) < 8_000_000

# ---- folders of images ----

GRAY = np.random.default_rng(0).integers(0, 256, (6,9), dtype=np.uint8)

def png(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(GRAY).save(path)

def found(folder): return [o.relative_to(folder).as_posix() for o in get_image_files(folder)]

def test_hidden_files_and_folders_are_skipped(tmp_path):
    root = tmp_path/'.cache'        # but the folder itself may be in a hidden one
    for o in ('3/0.png', '3/.ipynb_checkpoints/0-checkpoint.png', '3/._0.png', '.trash/1.png', '7/.png'): png(root/'data'/'x.png') or \
        (root/'data'/o).parent.mkdir(parents=True, exist_ok=True) or (root/'data'/o).write_bytes(b'')
    assert found(root/'data') == ['3/0.png', 'x.png']

def test_suffixes(tmp_path):
    for o in 'png jpg jpeg webp bmp gif tif tiff PNG Tiff'.split(): Image.fromarray(GRAY).save(tmp_path/f'{o}.{o}')
    for o in 'txt npy csv png.part pngx'.split(): (tmp_path/f'a.{o}').write_bytes(b'')
    files = get_image_files(tmp_path)
    assert len(files) == 10 and files == sorted(files, key=str)
    assert torch.equal(stack_images([f for f in files if f.suffix.lower() not in ('.jpg', '.jpeg', '.webp')]),
                       torch.from_numpy(GRAY).expand(7,-1,-1)/255)
    assert stack_images(files).sub(torch.from_numpy(GRAY)/255).abs().mean() < 0.1

def test_linked_folders_are_found_and_loops_end(tmp_path):
    png(tmp_path/'x'/'cats'/'0.png')
    png(tmp_path/'set'/'train'/'dogs'/'0.png')
    (tmp_path/'set'/'train'/'cats').symlink_to(tmp_path/'x'/'cats')
    (tmp_path/'set'/'train'/'kitties').symlink_to(tmp_path/'x'/'cats')
    (tmp_path/'set'/'valid').symlink_to(tmp_path/'set'/'train')
    (tmp_path/'x'/'cats'/'up').symlink_to(tmp_path/'x')
    (tmp_path/'set'/'train'/'again').symlink_to(tmp_path/'set')
    (tmp_path/'set'/'train'/'self').symlink_to(tmp_path/'set'/'train'/'self')
    want = [f'{part}/{c}/0.png' for part in ('train', 'valid') for c in ('cats', 'dogs', 'kitties')]
    assert [o for o in found(tmp_path/'set') if 'up' not in o and 'again' not in o] == want
    assert len(found(tmp_path/'set')) < 20
    (tmp_path/'link').symlink_to(tmp_path/'set')
    assert set(want) <= set(found(tmp_path/'link'))

# ---- images as a viewer shows them ----

def opened(path, mode='L'):
    with open(path, 'rb') as f, Image.open(f) as im: return np.array(convert_image(im, mode))

@pytest.mark.parametrize('suffix', ['png', 'jpg', 'tif', 'webp'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_every_orientation_is_turned_upright(tmp_path, suffix, orientation):
    "What is stored is the picture seen through the inverse; a viewer (here: Pillow) turns it back"
    upright = Image.fromarray(GRAY.repeat(8, 0).repeat(8, 1))
    back = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    exif = Image.Exif()
    exif[0x0112] = back
    upright.save(tmp_path/'a.png', exif=exif)
    with Image.open(tmp_path/'a.png') as im: stored = ImageOps.exif_transpose(im)
    exif[0x0112] = orientation
    stored.save(tmp_path/f'b.{suffix}', exif=exif, quality=95, lossless=True)
    assert stored.size == (upright.size if orientation<5 else upright.size[::-1])
    seen = opened(tmp_path/f'b.{suffix}')
    assert torch.equal(stack_images([tmp_path/f'b.{suffix}'])[0], torch.from_numpy(seen)/255)
    assert seen.shape == (48,72) and abs(seen.astype(int) - np.asarray(upright)).mean() < (3 if suffix=='jpg' else 0.01)

@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'P'])
def test_a_converted_image_is_left_as_it_was(tmp_path, mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GRAY).convert(mode).save(tmp_path/'a.png', exif=exif)
    with Image.open(tmp_path/'a.png') as im:
        im.load()
        before = im.size,im.mode,im.tobytes(),im.getexif()[0x0112]
        for to in ('L', 'RGB'): assert convert_image(im, to).size == im.size[::-1]
        assert (im.size,im.mode,im.tobytes(),im.getexif()[0x0112])==before

@pytest.mark.parametrize('exif', [b'Exif\0\0nonsense', b'Exif\0\0', b'Exif\0\0II*\0\x08\0\0\0\xff\xff', b'Exif\0\0MM\0*\xff\xff\xff\xff'])
@pytest.mark.filterwarnings('ignore')
def test_damaged_exif_does_not_spoil_the_pixels(tmp_path, exif):
    Image.fromarray(GRAY.repeat(8, 0)).save(tmp_path/'a.jpg', quality=95)
    Image.fromarray(GRAY.repeat(8, 0)).save(tmp_path/'b.jpg', quality=95, exif=exif)
    assert np.array_equal(opened(tmp_path/'a.jpg'), opened(tmp_path/'b.jpg'))

@pytest.mark.parametrize('suffix', ['png', 'tif', 'pgm'])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    a = np.array([[0, 128, 129, 20_000], [40_000, 65_279, 65_500, 65_535]], np.uint16)
    Image.fromarray(a).save(tmp_path/f'a.{suffix}')
    want = [[0, 0, 1, 78], [156, 254, 255, 255]]
    assert opened(tmp_path/f'a.{suffix}').tolist() == want
    assert opened(tmp_path/f'a.{suffix}', 'RGB')[...,1].tolist() == want

@pytest.mark.parametrize('dtype', [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(tmp_path, dtype):
    Image.fromarray(GRAY.astype(dtype)).save(tmp_path/'a.tif')
    with pytest.raises(DataError, match=r'a\.tif cannot be read.*32 bits'): stack_images([tmp_path/'a.tif'])

def test_palettes_are_resolved(tmp_path):
    Image.fromarray(np.array([[0,85],[170,255]], np.uint8)).quantize(4).save(tmp_path/'p.png')
    assert (stack_images([tmp_path/'p.png'])*255).tolist() == [[[0,85],[170,255]]]
    color = np.random.default_rng(0).integers(0, 256, (2,3,3), dtype=np.uint8)
    for f in ('p.gif', 'p.png', 'p.bmp'):
        Image.fromarray(color).quantize(6).save(tmp_path/f)
        assert np.array_equal(opened(tmp_path/f, 'RGB'), color)
        assert np.array_equal(opened(tmp_path/f), np.asarray(Image.fromarray(color).convert('L')))

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_what_is_transparent_is_white(tmp_path, mode):
    a = np.zeros((1,3,4), np.uint8)
    a[0,:,3] = 255, 0, 51       # black: opaque, transparent, and a fifth of it
    im = Image.fromarray(a).convert('LA') if mode=='LA' else Image.fromarray(a)
    if mode=='P': im = im.quantize(3, method=Image.Quantize.FASTOCTREE)
    im.save(tmp_path/'a.png')
    with Image.open(tmp_path/'a.png') as im: assert im.mode == mode
    assert opened(tmp_path/'a.png').tolist() == [[0, 255, 204]]
    assert opened(tmp_path/'a.png', 'RGB').tolist() == [[[0]*3, [255]*3, [204]*3]]

def test_one_color_may_be_the_transparent_one(tmp_path):
    Image.fromarray(np.array([[0,77,200]], np.uint8)).save(tmp_path/'a.png', transparency=77)
    assert opened(tmp_path/'a.png').tolist() == [[0, 255, 200]]

@pytest.mark.parametrize('content', [b'', b'not an image', b'\x89PNG\r\n\x1a\n'])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path/'a.png').write_bytes(content)
    with pytest.raises(DataError, match=r'a\.png cannot be read as an image'): stack_images([tmp_path/'a.png'])

# ---- saving ----

def test_classes_may_be_numbers(tmp_path):
    for classes in ([3,7], np.array([3,7]), {0: 3, 1: 7}, ('3','7')):
        folder = save_images(GRAY[None].repeat(2, 0), np.array([0,1]), tmp_path/str(type(classes).__name__), classes)
        assert found(folder) == ['3/0.png', '7/1.png']
    assert found(save_images(GRAY[None].repeat(2, 0), [3,7], tmp_path/'none')) == ['3/0.png', '7/1.png']

@pytest.mark.parametrize('classes', [['a/b','a-b'], ['a\\b','a-b'], ['\u00e9','e\u0301'], ['a','A'], ['a','a'], ['3',3], ['stra\u00dfe','STRASSE'],
                                     ['a',''], ['a','.'], ['a','..'], ['a','.hidden']], ids=ascii)
def test_class_names_that_fall_together_or_hide_are_refused(tmp_path, classes):
    with pytest.raises(ValueError, match='save_images.*rename'): save_images(GRAY[None].repeat(2, 0), [0,1], tmp_path/'x', classes)
    assert not (tmp_path/'x').exists()

def test_classes_that_name_no_label_are_refused(tmp_path):
    "Numbers written as text are other keys than the numbers: nothing would be saved"
    for classes in ({'0': 'a', '1': 'b'}, {7: 'a'}, {}):
        with pytest.raises(ValueError, match='nothing would be saved'):
            save_images(GRAY[None].repeat(2, 0), [0,1], tmp_path/'x', classes)
    assert not (tmp_path/'x').exists()
    assert found(save_images(GRAY[None].repeat(2, 0), [0,1], tmp_path/'y', {np.int64(1): 'b', 7: 'c'})) == ['b/1.png']
