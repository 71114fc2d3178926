"The commands behind `make run` and the set-up: what they print and do when something is wrong"
import os, subprocess, sys
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
    with pytest.raises(SystemExit, match='no notebook.* 7.*01_a, 02_b'): run.select(['7'])

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
    assert 'Python 99.1 or newer is needed' in one_line(e) and f'is {sys.version_info[0]}.{sys.version_info[1]}' in str(e.value)

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

def test_ready_environment_is_left_alone(env, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['env.py'])
    Path(env.PY).parent.mkdir(parents=True)
    for path,text in ((env.PY,''), (env.STAMP,env.fingerprint(False))): Path(path).write_text(text)
    def install(newest): raise AssertionError('installed again')
    monkeypatch.setattr(env, 'install', install)
    env.main()
    Path(env.ROOT, 'constraints.txt').write_text('torch==9')
    with pytest.raises(AssertionError, match='installed again'): env.main()
