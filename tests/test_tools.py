"The commands behind `make run` and the set-up: what they print and do when something is wrong"
import os, re, shutil, subprocess, sys, zipfile
from collections import namedtuple
from pathlib import Path

import nbformat, pytest

def notebook(path, *sources):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    nbformat.write(nb, path)
    return path

@pytest.fixture
def run(tool, tmp_path):
    "tools/run.py, with its notebooks in a folder of this test"
    run = tool('run')
    run.ROOT,run.NBS,run.OUT = tmp_path, tmp_path/'nbs', tmp_path/'_run'
    run.NBS.mkdir()
    return run

def test_failing_cell_is_named_and_ends_the_run(run, tmp_path):
    paths = [notebook(run.NBS/'01_bad.ipynb', 'x = 1', 'y = [2]\ny[x]'),
             notebook(run.NBS/'02_slow.ipynb', 'import time; time.sleep(60)'),
             notebook(run.NBS/'03_never.ipynb', f'open({str(tmp_path/"ran")!r}, "w").close()')]
    with pytest.raises(SystemExit) as e: run.run_all(paths)
    message = str(e.value)
    assert 'nbs/01_bad.ipynb, cell 2' in message and 'y[x]' in message and 'IndexError: list index out of range' in message
    assert not (tmp_path/'ran').exists()

def test_dead_kernel_is_an_error(run):
    with pytest.raises(SystemExit, match='01_dies.ipynb, cell 1'):
        run.run_all([notebook(run.NBS/'01_dies.ipynb', 'import os; os._exit(3)')])

def test_results_and_outputs_are_kept_and_eval_false_is_not_run(run):
    say = "import json, os, time\nwith open(os.environ['COURSE_RESULTS'], 'a') as f: f.write(json.dumps(dict(key='a.b', value=0.5, time=time.time()))+'\\n')"
    path = notebook(run.NBS/'01_ok.ipynb', say, '#| eval: false\n1/0', 'print(6*7)')
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].outputs = [nbformat.v4.new_output('stream', text='from before it was switched off')]
    nbformat.write(nb, path)
    c, = run.run_all([path])
    assert c.results['a.b']['value']==0.5 and 0 < c.results['a.b']['seconds'] <= c.seconds
    assert c.nb.cells[2].outputs[0].text=='42\n' and c.nb.cells[1].outputs==[]
    assert c.peak>10

def test_longest_chapters_begin_first(run, tmp_path):
    write = f"with open({str(tmp_path/'order')!r}, 'a') as f: f.write('%s')"
    paths = [notebook(run.NBS/f'{name}.ipynb', f"'*Two cores: {s} s, 1 MB.*'", write%name[1]) for name,s in [('01',7), ('02',90), ('03',12)]]
    assert [c.name for c in run.run_all(paths, workers=1)]==['01', '02', '03']
    assert (tmp_path/'order').read_text()=='231'

def test_chapters_are_chosen_by_the_start_of_their_names(run):
    for name in '01_a', '02_b', 'index': notebook(run.NBS/f'{name}.ipynb', '1')
    assert [p.stem for p in run.select([])]==['01_a', '02_b', 'index']
    assert [p.stem for p in run.select(['02', 'nbs/index.ipynb'])]==['02_b', 'index']
    with pytest.raises(SystemExit, match='no notebook.* .7..*01_a, 02_b'): run.select(['7'])

def test_an_unknown_name_beside_a_known_one_is_an_error(run):
    for name in '01_a', '02_b': notebook(run.NBS/f'{name}.ipynb', '1')
    with pytest.raises(SystemExit, match="starts with '03' or ''; there are: 01_a, 02_b"): run.select(['01', '03', 'nbs/02_b.ipynb', ''])
    assert [p.stem for p in run.select(['02', '0', '01_a'])]==['01_a', '02_b']

def test_a_notebook_has_one_thread(run, monkeypatch):
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): monkeypatch.setenv(name, '2')
    c, = run.run_all([notebook(run.NBS/'01_a.ipynb', 'import torch; print(torch.get_num_threads())')])
    assert c.nb.cells[0].outputs[0].text=='1\n'

LEDGER = '''[01_a]
acc = {expected = 0.5, source = "s"}
n_params = {expected = 3, source = "s"}
[[ladder]]
model = "naïve"
task = "coins"
accuracy = "01_a.acc"
params = "01_a.n_params"'''

@pytest.fixture
def course(tmp_path, root):
    "A course of two chapters, the first with a rung of the ladder; `course(...)` runs its tools/run.py in another folder"
    for name in 'course/nbs', 'course/tools', 'elsewhere': (tmp_path/name).mkdir(parents=True)
    shutil.copy(root/'tools'/'run.py', tmp_path/'course'/'tools')
    (tmp_path/'course'/'nbs'/'ledger.toml').write_text(LEDGER, encoding='utf-8')
    notebook(tmp_path/'course'/'nbs'/'01_a.ipynb', "from course_lib.core import expect\nexpect('01_a.acc', 0.5); expect('01_a.n_params', 3)")
    notebook(tmp_path/'course'/'nbs'/'02_b.ipynb', '1')
    def start(*args, **env):
        env = {**os.environ, 'PYTHONPATH': str(root), **env}
        return subprocess.Popen([sys.executable, str(tmp_path/'course'/'tools'/'run.py'), *args], cwd=tmp_path/'elsewhere', env=env,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return start

def test_runs_from_another_folder_and_prints_the_ladder(course):
    out,err = [o.decode('utf-8') for o in course(PYTHONIOENCODING='utf-8').communicate()]
    assert 'notebooks run: 2' in out and [o.split()[:6] for o in out.splitlines() if o.startswith('naïve')]==[['naïve', 'coins', '3', '0.5000', '0.5000', '01_a']], out+err

def test_what_the_output_cannot_take_is_replaced(course):
    p = course('01', PYTHONIOENCODING='ascii')
    out,err = p.communicate()
    assert p.returncode==0 and b'na?ve' in out, err.decode()

@pytest.mark.skipif(os.name=='nt', reason='there is no head')
@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_a_reader_that_stops_early_gets_no_traceback(course, unbuffered):
    p = course(PYTHONUNBUFFERED=unbuffered)
    p.stdout.close()
    assert b'Traceback' not in (err := p.stderr.read()) and b'Exception' not in err, err.decode()
    p.stderr.close()
    assert p.wait()==1

def test_measured_line_is_written_once_and_left_alone_while_about_right(run):
    line = '*Two cores: 1 s, 1 MB. Last run: torch 2.13.0.*'
    c = run.Chapter(notebook(run.NBS/'01_a.ipynb', line), stop=None)
    c.seconds,c.peak = 12.3,456
    run.stamp(c)
    assert c.nb.cells[0].source.startswith('*Two cores: 12 s, 460 MB. Last run: torch ')
    c.seconds,c.peak = 14.,500
    run.stamp(c)
    assert c.nb.cells[0].source.startswith('*Two cores: 12 s, 460 MB.')

@pytest.fixture
def env(tool, tmp_path, root):
    "tools/env.py, working in a folder of this test"
    env = tool('env')
    for name in 'settings.ini', 'constraints.txt', 'setup.py': (tmp_path/name).write_bytes((root/name).read_bytes())
    env.ROOT,env.VENV,env.LOG = str(tmp_path), str(tmp_path/'.venv'), str(tmp_path/'log')
    env.PY,env.STAMP = env.PY.replace(str(root), str(tmp_path)), str(tmp_path/'.venv'/'installed')
    return env

def one_line(e):
    message = str(e.value)
    assert '\n' not in message
    return message

def test_too_old_python_gets_one_line(env, monkeypatch):
    monkeypatch.setattr(env, 'OLDEST', (99, 1))
    with pytest.raises(SystemExit) as e: env.main()
    assert 'Python 99.1 or newer is needed' in one_line(e) and 'is {}.{}.{}'.format(*sys.version_info) in str(e.value)

def test_oldest_python_is_the_one_of_settings(tool, root):
    assert f"\nmin_python = {'.'.join(map(str, tool('env').OLDEST))}\n" in (root/'settings.ini').read_text(encoding='utf-8')

def test_oldest_torch_is_the_one_that_the_tests_run_on(root):
    "An older one is promised again when the tests have been seen to pass on it"
    floor = re.search(r'torch>=([\d.]+),', (root/'settings.ini').read_text(encoding='utf-8'))[1]
    tested = re.search(r'^torch==([\d.]+)', (root/'constraints.txt').read_text(encoding='utf-8'), re.M)[1]
    assert tested.startswith(f'{floor}.')

def test_set_up_is_readable_by_old_pythons(root):
    source = (root/'tools'/'env.py').read_text(encoding='ascii')      # Python 2 stops at other characters
    assert "f'" not in source and 'f"' not in source

def test_full_disk_gets_one_line(env, monkeypatch):
    Usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(env.shutil, 'disk_usage', lambda p: Usage(10**11, 10**11-10**9, 10**9))
    with pytest.raises(SystemExit) as e: env.install(False)
    assert 'only 1.0 GB free' in one_line(e)
    assert 'the disk is full' in env.why('ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device')

def test_no_network_gets_one_line_and_is_tried_again(env, monkeypatch):
    for name in [o for o in os.environ if o.startswith('PIP_')]: monkeypatch.delenv(name)
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')       # nothing listens there
    monkeypatch.setenv('PIP_NO_CACHE_DIR', '1')
    monkeypatch.setattr(sys, 'argv', ['env.py'])
    with pytest.raises(SystemExit) as e: env.main()
    assert 'cannot reach the Python package index' in one_line(e)
    assert not Path(env.STAMP).exists()         # so the next call begins again

def test_no_wheel_for_this_python_names_the_package(env, monkeypatch, tmp_path):
    for name in [o for o in os.environ if o.startswith('PIP_')]: monkeypatch.delenv(name)
    (tmp_path/'index').mkdir()
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_INDEX_URL', (tmp_path/'index').as_uri())       # it answers, and has nothing for us
    with pytest.raises(SystemExit) as e: env.install(False)
    assert 'the package index has no torch==' in one_line(e) and 'and Python {}.{} on'.format(*sys.version_info) in str(e.value)

def test_ready_environment_is_left_alone(env, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['env.py'])
    Path(env.PY).parent.mkdir(parents=True)
    for path,text in ((env.PY,''), (env.STAMP,env.fingerprint(False))): Path(path).write_text(text)
    def install(newest): raise AssertionError('installed again')
    monkeypatch.setattr(env, 'install', install)
    env.main()
    Path(env.ROOT, 'constraints.txt').write_text('torch==9')
    with pytest.raises(AssertionError, match='installed again'): env.main()

OFFLINE = "WARNING: Retrying (Retry(total=0, ...)) after connection broken by 'NewConnectionError('...')': /simple/torch/\n"
NONE = 'ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)\n'
SOME = 'ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: 2.0.0, 2.0.1)\n'
CONFLICT = '''ERROR: Cannot install torch<3 and >=2.13 because these package versions have conflicting dependencies.
The conflict is caused by:
    The user requested torch<3 and >=2.13
    The user requested (constraint) torch==2.13.0
ERROR: ResolutionImpossible: for help visit https://pip.pypa.io'''
NO_MATCH = 'ERROR: No matching distribution found for torch==2.13.0\n'

@pytest.mark.parametrize('out,says', [
    (OFFLINE+NONE+NO_MATCH, 'cannot reach the Python package index'), (NONE+NO_MATCH, 'has no torch==2.13.0 that fits settings.ini and Python '), (SOME+NO_MATCH, 'has no torch==2.13.0 that fits settings.ini and Python '),
    (OFFLINE+SOME+NO_MATCH, 'has no torch==2.13.0 that fits settings.ini and Python '),        # one try failed, the next one did not
    (OFFLINE+CONFLICT, 'cannot reach the Python package index'), (CONFLICT, 'has no torch==2.13.0 that fits settings.ini and Python '),     # what pip says with pins
    (OFFLINE+'ERROR: Failed building wheel for blis\nERROR: Could not build wheels for blis', 'blis comes without a wheel for Python '),
    ('ERROR: Failed to build installable wheels for some pyproject.toml based projects (numpy, blis)', 'numpy, blis comes without a wheel'),
    ("ERROR: Failed to build 'numpy' when getting requirements to build wheel", 'numpy comes without a wheel'),
    ('error: metadata-generation-failed', 'a package comes without a wheel'),
    ("WARNING: Retrying ... SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] ...'))\nMax retries exceeded\n"+NONE+NO_MATCH, 'certificate'),
    ('ERROR: ResolutionImpossible: for help visit', 'contradict each other'), ('[Errno 13] Permission denied: x', 'permission is missing'),
    ('something else', 'installing the packages failed')])
def test_a_failed_installation_is_blamed_on_what_failed(env, out, says):
    assert says in (line := env.why(out)) and '\n' not in line

def test_packages_go_into_the_environment_whatever_pip_was_told(env, monkeypatch, tmp_path):
    wheel = tmp_path/'tiny-1.0-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as z:
        z.writestr('tiny.py', 'where = __file__')
        z.writestr('tiny-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n')
        z.writestr('tiny-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr('tiny-1.0.dist-info/RECORD', '')
    (tmp_path/'other').mkdir()
    zipfile.ZipFile(wheel).extractall(tmp_path/'other')     # another one, which must not be taken for installed
    for name,value in dict(PIP_USER='1', PIP_TARGET=tmp_path/'target', PIP_PREFIX=tmp_path/'prefix', PIP_DRY_RUN='1', PYTHONPATH=tmp_path/'other').items():
        monkeypatch.setenv(name, str(value))
    for cmd in ([sys.executable, '-m', 'venv', env.VENV], [env.PY, '-m', 'pip', 'install', '--no-index', wheel]):
        rc,out = env.run(*map(str, cmd))
        assert rc==0, out
    rc,out = env.run(env.PY, '-c', 'import tiny; print(tiny.where)')
    assert rc==0 and out.startswith(env.VENV)
