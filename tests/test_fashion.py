"A whole project: its network, its tables, and an experiment that is killed and goes on"
import csv, json, keyword, math, os, signal, subprocess, sys
from itertools import product
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from course_lib import module
from course_lib.checkpoint import CheckpointCB
from course_lib.callbacks import TrackResults
from course_lib.core import set_seed, test_near
from course_lib.dataloader import DataLoader, DataLoaders, Dataset
from course_lib.fashion import (Network, RunBuilder, RunManager, TensorBoardCB, confusion_matrix, get_all_preds,
                                get_num_correct, plot_confusion_matrix)
from course_lib.learner import Callback, CancelEpochException, CancelFitException, Learner
from course_lib.losses import accuracy
from course_lib.optim import Adam

EPOCHS = 2
RUNS = RunBuilder.get_runs(dict(lr=[0.1, 0.01], bs=[20, 30]))    # 3 or 2 training batches in an epoch of 60 items

class Kill(Callback):
    "Ends the process, without a chance to clean up, at training batch `at`, counted over all runs"
    order = 200
    def __init__(self, at): self.left = at
    def after_batch(self):
        self.left -= self.training
        if self.left<0: os.kill(os.getpid(), signal.SIGKILL)

def make_learner(run, cbs=()):
    set_seed(1)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(90, 5, generator=g)
    y = x[:,:3].argmax(1)
    dls = DataLoaders.from_datasets(Dataset(x[:60], y[:60]), Dataset(x[60:], y[60:]), bs=run.bs, seed=4)
    return Learner(nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 3)), dls, F.cross_entropy, run.lr,
                   [TrackResults(), *cbs], Adam)

def experiment(folder, checkpoints, cbs=()):
    "What a process does: go through the runs that are not finished"
    manager = RunManager(folder/'grid.json')
    for run in manager.todo(RUNS):
        saved = [CheckpointCB(folder/f'{run.lr}-{run.bs}', resume=True)] if checkpoints else []
        make_learner(run, [*saved, *cbs]).fit(EPOCHS, cbs=manager)
    return manager

def without_time(rows): return [{k: v for k,v in row.items() if k!='seconds'} for row in rows]
def read(folder): return json.loads((folder/'grid.json').read_text()) if (folder/'grid.json').exists() else []

def killed_again_and_again(folder, checkpoints):
    """Run `experiment` in processes that are killed, each a little later, until one comes to its end; returns what was
    in the file after each"""
    found = []
    for at in [0, 1, 4, 2, 6, 3, 5, 7, 5, 30]:
        pid = os.fork()
        if not pid:
            try: experiment(folder, checkpoints, [Kill(at)])
            except BaseException as e: os.write(2, repr(e).encode())
            else: os._exit(0)
            os._exit(1)
        status = os.waitpid(pid, 0)[1]
        found.append([os.WIFSIGNALED(status) and os.WTERMSIG(status), os.waitstatus_to_exitcode(status), read(folder)])
        if not found[-1][0]: break
    return found

def watched(folder, cbs=()):
    "A fit of 3 epochs of 3 training batches, saved after each batch, and watched by TensorBoard"
    learn = make_learner(RUNS[0], [TensorBoardCB(folder/'events'), *cbs])
    learn.fit(EPOCHS+1, cbs=CheckpointCB(folder/'saved', every=1, resume=True))

def killed_while_watched(folder):
    "`watched` in processes that are killed after some batches, until one comes to its end"
    found = []
    for at in [1, 1, 1, 2, 30]:
        pid = os.fork()
        if not pid:
            try: watched(folder, [Kill(at)])
            except BaseException as e: os.write(2, repr(e).encode())
            else: os._exit(0)
            os._exit(1)
        status = os.waitpid(pid, 0)[1]
        found.append([os.WIFSIGNALED(status), os.waitstatus_to_exitcode(status), []])
        if not found[-1][0]: break
    return found

def dying_writes(folder):
    "Processes that are killed within the writing of the files, each at a later move of a file"
    found = []
    for n in range(6):
        pid = os.fork()
        if not pid:
            replace,calls = os.replace,[]
            def dying(a, b):
                calls.append(b)
                if len(calls)==3+n: os.kill(os.getpid(), signal.SIGKILL)
                replace(a, b)
            os.replace = dying
            experiment(folder, False)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        found.append([os.WIFSIGNALED(status), 0, read(folder)])
    return found

@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    """Folders where experiments were killed, and what was found after each time

    A process that forks must not have computed with several threads before, so it is a new one."""
    if not hasattr(os, 'fork'): pytest.skip('this system cannot fork')
    folder,env = tmp_path_factory.mktemp('killed'),{**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode==0, done.stderr
    return folder,json.loads(done.stdout.splitlines()[-1])

def progress(runs): return sum(len(r['epochs']) for r in runs if r['finished'])

@pytest.mark.parametrize('how', ['plain', 'checkpoints'])
def test_a_killed_experiment_goes_on_and_ends_with_the_same_rows(tmp_path, killed, how):
    folder,found = killed[0]/how,killed[1][how]
    *before,(signalled,code,_) = found
    assert len(before)>3 and all(o[0]==signal.SIGKILL for o in before), 'they should have been killed'
    assert (signalled, code)==(False, 0)
    done = [progress(runs) for _,_,runs in found]
    assert done==sorted(done), 'no finished run is ever lost'
    assert any(not r['finished'] for _,_,runs in before for r in runs), 'one was killed with an epoch of a run done'
    undisturbed = experiment(tmp_path, False)
    manager = RunManager(folder/'grid.json')
    assert without_time(manager.rows())==without_time(undisturbed.rows())
    assert [*manager.todo(RUNS)]==[]
    with open(folder/'grid.csv', newline='') as f: rows = [*csv.DictReader(f)]
    assert [float(r['valid_loss']) for r in rows]==[r['valid_loss'] for r in manager.rows()]

def scalars(folder):
    "What TensorBoard finds in `folder`: name -> {step: value}; a step that was written twice must have one value"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events,found = EventAccumulator(str(folder)).Reload(),{}
    for name in events.Tags()['scalars']:
        for o in events.Scalars(name): assert found.setdefault(name, {}).setdefault(o.step, o.value)==o.value, (name, o)
    return found

def test_curves_have_no_gap_where_a_fit_was_killed(tmp_path, killed):
    "Killed within passes, and resumed from checkpoints in the middle of them"
    folder,found = killed[0]/'watched',killed[1]['watched']
    assert sum(o[0] for o in found)>=3 and found[-1][:2]==[False, 0]
    watched(tmp_path)
    got,wanted = scalars(folder/'events'),scalars(tmp_path/'events')
    assert list(wanted['batch/loss'])==list(range(1, 10)) and set(wanted)=={'batch/loss', 'train/loss', 'train/accuracy',
                                                                            'valid/loss', 'valid/accuracy'}
    assert got==wanted

def test_an_interrupted_fit_writes_what_it_has(tmp_path):
    class Stop(Callback):
        def after_step(self):
            if self.step_count==5: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): make_learner(RUNS[0], [TensorBoardCB(tmp_path), Stop()]).fit(3)
    assert list(scalars(tmp_path)['batch/loss'])==[1, 2, 3, 4]

def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(ImportError, match='TensorBoardCB: .*pip install tensorboard'):
        make_learner(RUNS[0], [TensorBoardCB(tmp_path)]).fit(1)

def test_killed_while_writing(killed):
    "Whenever it dies, there is a whole file, and no finished run is lost"
    folder,found = killed[0]/'writes',killed[1]['writes']
    assert [o[0] for o in found]==[True]*6
    for _,_,runs in found: assert sum(len(r['epochs']) for r in runs)>=1
    done = [progress(runs) for _,_,runs in found]
    assert done==sorted(done)
    experiment(folder, False)
    with open(folder/'grid.csv', newline='') as f: assert len([*csv.DictReader(f)])==len(RUNS)*EPOCHS

def test_checkpoints_keep_the_epochs_before_them(tmp_path):
    "With a checkpoint a run goes on after its last whole epoch, and the row of that epoch stays, seconds and all"
    class Stop(Callback):
        order = 200         # after CheckpointCB, which has saved the end of the first epoch by then
        def before_epoch(self):
            if self.training and self.epoch==1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): experiment(tmp_path, True, [Stop()])
    first, = read(tmp_path)
    assert len(first['epochs'])==1 and not first['finished']
    first['epochs'][0]['seconds'] = 123.        # no other run takes so long
    (tmp_path/'grid.json').write_text(json.dumps([first]))
    experiment(tmp_path, True)
    assert read(tmp_path)[0]['epochs'][0]==first['epochs'][0]
    (tmp_path/'grid.json').unlink()
    with pytest.raises(ValueError, match='has done 2 epochs .* knows 0'): experiment(tmp_path, True)

def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    manager = RunManager(tmp_path/'a.json')
    manager.begin_run(dict(lr=1))
    manager.begin_epoch()
    manager.end_epoch(loss=1.)
    before = (tmp_path/'a.json').read_bytes(), (tmp_path/'a.csv').read_bytes()
    def full(_): raise OSError('no space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    manager.begin_epoch()
    with pytest.raises(OSError, match=r'a\.json cannot be written \(no space left.*held before is still there'):
        manager.end_epoch(loss=0.5)
    assert ((tmp_path/'a.json').read_bytes(), (tmp_path/'a.csv').read_bytes())==before
    assert sorted(o.name for o in tmp_path.iterdir())==['a.csv', 'a.json']      # no half-written file stays
    assert len(RunManager(tmp_path/'a.json').rows())==1

def test_numbers_that_json_lacks(tmp_path):
    manager = RunManager(tmp_path/'a.json')
    manager.begin_run(dict(lr=1))
    manager.begin_epoch()
    manager.end_epoch(loss=math.nan, valid_accuracy=torch.tensor(0.5), other=math.inf)
    manager.end_run()
    def refuse(o): raise AssertionError(o)
    row = json.loads((tmp_path/'a.json').read_text(), parse_constant=refuse)[0]['epochs'][0]
    assert (row['loss'], row['other'], row['valid_accuracy'])==(None, None, 0.5)
    assert RunManager(tmp_path/'a.json').table().loss.isna().all()

@pytest.mark.parametrize('text', ['', '[{"params": {"lr"', '{"a": 1}', '[1]', '[{"params": {}}]', '"x"', '3'])
def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path, text):
    (tmp_path/'a.json').write_text(text)
    with pytest.raises(ValueError, match='move it away'): RunManager(tmp_path/'a.json')
    assert (tmp_path/'a.json').read_text()==text

def test_manager_refuses_what_it_cannot_keep(tmp_path):
    manager = RunManager(tmp_path/'a.json')
    with pytest.raises(RuntimeError, match='no run has begun'): make_learner(RUNS[0]).fit(1, cbs=manager)
    with pytest.raises(RuntimeError, match='no run has begun'): manager.end_run()
    for bad in dict(lr=1), 0.1:
        with pytest.raises(TypeError, match=r'a named tuple or a dict.*, and a list of such in todo'): [*manager.todo(bad if isinstance(bad, dict) else [bad])]
    for bad,why in [(dict(lr=math.nan), 'lr is nan'), (dict(opt=Adam), 'opt is'), (dict(lr=[1]), r'lr is \[1\]'),
                    (dict(epoch=1), 'called epoch'), ({}, 'no hyper-parameters')]:
        with pytest.raises((TypeError, ValueError), match=why): manager.begin_run(bad)
    manager.begin_run(dict(lr=1))
    with pytest.raises(RuntimeError, match='no epoch has begun'): manager.end_epoch(loss=1.)
    with pytest.raises(RuntimeError, match='without an epoch'): manager.end_run()
    manager.begin_epoch()
    with pytest.raises(RuntimeError, match='epoch 1 has not ended'): manager.begin_epoch()
    with pytest.raises(TypeError): manager.end_epoch(loss='low')
    with pytest.raises(RuntimeError, match='in the middle'): manager.end_run()
    for name in 'lr', 'run', 'seconds':
        with pytest.raises(ValueError, match=f'called {name}'): manager.end_epoch(**{name: 1.})
    manager.end_epoch(loss=1.)              # a mistake in a name does not cost the epoch
    manager.end_run()
    assert not RunManager(tmp_path/'a.json').is_finished(dict(lr=1.5))

class StopAt(Callback):
    "Raises `error` at the beginning of a pass of epoch `epoch`, or in its first batch"
    def __init__(self, epoch, error=CancelFitException, training=True, in_batch=False):
        self.at,self.error,self.in_batch = (epoch, training),error,in_batch
    def before_epoch(self):
        if not self.in_batch and (self.epoch, self.training)==self.at: raise self.error
    def after_loss(self):
        if self.in_batch and (self.epoch, self.training)==self.at: raise self.error

def test_two_fits_of_a_run_go_on_counting(tmp_path):
    manager = RunManager(tmp_path/'a.json')
    manager.begin_run(RUNS[0])
    learn = make_learner(RUNS[0])
    learn.fit(1, cbs=manager)
    learn.fit(2, cbs=manager)
    manager.end_run()
    losses = [o['loss'] for o in learn.history if not o['train']]
    assert [r['valid_loss'] for r in manager.rows()]==losses and len(losses)==3

def test_a_second_fit_goes_on_after_one_that_had_nothing_left(tmp_path):
    for done in (0, 1):         # the second time its checkpoint is that of the end
        manager = RunManager(tmp_path/'a.json')
        manager.begin_run(RUNS[0])
        learn = make_learner(RUNS[0], [CheckpointCB(tmp_path/'saved', resume=True)])
        learn.fit(2, cbs=manager)
        assert [r['epoch'] for r in manager.rows()]==[1, 2]
    learn.remove_cbs(learn.cbs[-1])
    learn.fit(1, cbs=manager)
    manager.end_run()
    assert [r['epoch'] for r in manager.rows()]==[1, 2, 3]
    assert manager.rows()[-1]['valid_loss']==learn.history[-1]['loss']

@pytest.mark.parametrize('in_batch', [False, True], ids=['before the pass', 'in a batch'])
@pytest.mark.parametrize('at,training,epochs', [(0, True, 0), (0, False, 0), (1, True, 1), (1, False, 1)])
def test_a_fit_that_is_ended_ends_its_run_and_not_the_grid(tmp_path, capsys, at, training, epochs, in_batch):
    "An early stop, or a guard against nan, may end it in any pass, even in the first"
    manager = RunManager(tmp_path/'a.json')
    for run in manager.todo(RUNS[:3]):
        stop = [StopAt(at, training=training, in_batch=in_batch)] if run==RUNS[1] else []
        make_learner(run, stop).fit(2, cbs=manager)
    assert [(len(r['epochs']), r['finished']) for r in manager.runs]==[(2, True), (epochs, True), (2, True)]
    assert ('lr 0.1, bs 30: ended without an epoch' in capsys.readouterr().out)==(not epochs)
    assert [*RunManager(tmp_path/'a.json').todo(RUNS[:3])]==[]
    assert f'lr 0.1, bs 30: finished in a.json (epochs: {epochs}), skipped' in capsys.readouterr().out

def test_an_error_that_is_caught_does_not_end_the_grid(tmp_path):
    manager = RunManager(tmp_path/'a.json')
    for run in manager.todo(RUNS[:2]):
        try: make_learner(run, [StopAt(1, MemoryError, in_batch=True)]).fit(3, cbs=manager)
        except MemoryError: continue
    assert [(len(r['epochs']), r['finished']) for r in manager.runs]==[(1, True)]*2

@pytest.mark.parametrize('how', ['no validation', 'cancelled validation', 'cancelled training', 'validation alone'])
def test_epochs_that_lack_a_pass_have_what_there_is(tmp_path, how):
    class Skip(Callback):
        def before_batch(self):
            if self.training==(how=='cancelled training') and self.epoch: raise CancelEpochException
    manager = RunManager(tmp_path/'a.json')
    manager.begin_run(RUNS[0])
    learn = make_learner(RUNS[0], [Skip()] if 'cancelled' in how else [])
    learn.fit(3, cbs=manager, valid=how!='no validation', train=how!='validation alone')
    manager.end_run()
    rows,epochs = manager.rows(),range(3)
    assert [r['epoch'] for r in rows]==[1, 2, 3]
    for kind in 'train', 'valid':
        losses = {row['epoch']: row['loss'] for row in learn.history if row['train']==(kind=='train')}
        assert [r.get(f'{kind}_loss') for r in rows]==[losses.get(i) for i in epochs]
    assert [*csv.DictReader(open(tmp_path/'a.csv'))][2]['seconds']

def test_a_run_that_nobody_told_of_any_epoch_is_not_finished(tmp_path):
    manager = RunManager(tmp_path/'a.json')
    with pytest.raises(RuntimeError, match=r'without an epoch.*fit\(cbs=manager\)'):
        for run in manager.todo(RUNS): make_learner(run).fit(1)
    assert not RunManager(tmp_path/'a.json').is_finished(RUNS[0])

def test_numpys_numbers_are_taken_and_saved_as_plain_ones(tmp_path):
    params = dict(bs=np.array([32, 64]), lr=np.array([0.5, 0.25], dtype=np.float32), norm=[np.True_, np.bool_(False)],
                  wd=torch.tensor([0.125]), kind=np.array(['a']))
    runs = RunBuilder.get_runs(params)
    plain = RunBuilder.get_runs(dict(bs=[32, 64], lr=[0.5, 0.25], norm=[True, False], wd=[0.125], kind=['a']))
    assert runs==plain and [list(map(type, r)) for r in runs]==[[int, float, bool, float, str]]*8
    manager = RunManager(tmp_path/'a.json')
    for run in manager.todo([dict(bs=np.int64(32), lr=np.float64(0.5))]):
        manager.begin_epoch()
        manager.end_epoch(valid_accuracy=np.float32(0.25), loss=np.float64('nan'))
    again = RunManager(tmp_path/'a.json')
    assert again.is_finished(dict(bs=32, lr=0.5)) and again.is_finished(dict(bs=np.int32(32), lr=torch.tensor(0.5)))
    assert (again.rows()[0]['valid_accuracy'], again.rows()[0]['loss'])==(0.25, None)

def test_table_without_pandas(tmp_path, monkeypatch):
    manager = RunManager(tmp_path/'a.json')
    with pytest.raises(ValueError, match='there is nothing at all yet'): manager.plot()
    monkeypatch.setitem(sys.modules, 'pandas', None)
    with pytest.raises(ImportError, match='RunManager: .*pip install pandas'): manager.table()
    assert manager.rows()==[]

def test_plot_draws_a_line_for_each_run_that_has_the_result(tmp_path):
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    manager,wanted = RunManager(tmp_path/'a.json'),{}
    for i,run in enumerate(manager.todo([dict(lr=10.**-k) for k in range(10)])):
        values = [i/10, math.nan, 0.5][:i%3+1]
        for v in values:
            manager.begin_epoch()
            manager.end_epoch(acc=v)
        wanted[f"lr {run['lr']}"] = values
    ax = manager.plot('acc')
    got = {line.get_label(): line.get_ydata()[:len(wanted[line.get_label()])] for line in ax.lines}
    assert list(got)==list(wanted) and [o.get_text() for o in ax.get_legend().texts]==list(wanted)
    for name,values in wanted.items(): np.testing.assert_array_equal(got[name], values)
    assert len({(line.get_marker(), line.get_linestyle()) for line in ax.lines})==8
    assert (ax.get_ylabel(), ax.get_xlabel())==('acc', 'epoch')
    assert manager.plot('acc', ax=plt.subplots()[1]).get_title()=='The runs compared'
    with pytest.raises(ValueError, match='no epoch has a f1; there is acc, epoch, lr, run, seconds'): manager.plot('f1')
    plt.close('all')

names = st.from_regex(r'[a-z][a-z0-9]{0,5}', fullmatch=True).filter(lambda o: not keyword.iskeyword(o))
@given(st.dictionaries(names, st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), max_size=4))
@settings(deadline=None, max_examples=30)
def test_runs_are_the_product(params):
    runs = RunBuilder.get_runs(params)
    assert [tuple(r) for r in runs]==[*product(*params.values())]
    assert all(list(r._asdict())==list(params) for r in runs)

def test_runs_take_generators_and_refuse_nonsense():
    assert [r.lr for r in RunBuilder.get_runs({'lr': (10**-i for i in (1, 2))})]==[0.1, 0.01]
    for bad in 'class', '_lr', '1st', 'a-b', '':
        with pytest.raises(ValueError, match='identifier|keyword|underscore'): RunBuilder.get_runs({bad: [1]})
    with pytest.raises(TypeError, match=r'use \[0.1\]'): RunBuilder.get_runs(dict(lr=0.1))

@given(st.integers(2, 6).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.tuples(*[st.integers(0, c-1)]*2), min_size=1, max_size=30))))
@settings(deadline=None, max_examples=30)
def test_confusion_matrix_is_scikit_learns(case):
    from sklearn.metrics import confusion_matrix as theirs
    c,pairs = case
    preds,targs = map(list, zip(*pairs))
    wanted = theirs(targs, preds, labels=range(c))
    for dtype in torch.int64, torch.int32, torch.uint8:
        assert (confusion_matrix(torch.tensor(preds, dtype=dtype), torch.tensor(targs, dtype=dtype), c).numpy()==wanted).all()
    scores = F.one_hot(torch.tensor(preds), c).float()
    assert (confusion_matrix(scores, torch.tensor(targs)).numpy()==wanted).all()
    assert (confusion_matrix(np.array(preds), np.array(targs), c).numpy()==wanted).all()
    assert confusion_matrix(preds, targs).sum()==len(pairs)

def test_confusion_matrix_at_the_edges():
    none = torch.zeros(0, dtype=torch.int64)
    assert confusion_matrix(none, none, 3).tolist()==[[0]*3]*3
    assert confusion_matrix(none, none).shape==(0, 0)
    one = torch.zeros(2, dtype=torch.int64)
    assert confusion_matrix(torch.zeros(2, 3), one, np.int64(4)).tolist()==[[2, 0, 0, 0]]+[[0]*4]*3
    for preds,targs,n,why in [(torch.tensor([[0., 0., 1.]]*2), one, 2, r'predictions\[0\] is 2'), (torch.zeros(2), one, None, 'float32'),
                              (one, torch.zeros(2, 1).long(), None, r'targets are \(2, 1\).*squeeze\(1\)'), (one==0, one, None, 'bool'),
                              (one, one, 0, 'n_classes is 0'), (one, one, 2.5, 'n_classes is 2.5'), (one, one, True, 'n_classes is True'),
                              (one[:,None], one, None, r'predictions are \(2, 1\) int64.*squeeze\(1\)')]:
        with pytest.raises((ValueError, TypeError), match=why): confusion_matrix(preds, targs, n)

@pytest.mark.parametrize('f', [get_num_correct, confusion_matrix])
def test_a_single_column_of_scores_is_refused(f):
    "Its largest entry is always the first, so all would be of class 0"
    for targs in (torch.tensor([1, 0]), torch.tensor([[1], [0]])):
        with pytest.raises(TypeError, match=r'predictions are \(2, 1\) float32.*batch_accuracy'): f(torch.tensor([[5.], [-5.]]), targs)

def test_nan_names_no_class():
    "It would be the largest of its row, and count as an answer"
    preds,targs = torch.tensor([[2., 1.], [math.nan, 0.], [0., math.nan]]),torch.tensor([0, 0, 1])
    assert get_num_correct(preds, targs)==1 and get_num_correct(preds[1:], targs[1:])==0
    with pytest.raises(ValueError, match=r'nan among the scores of predictions\[1\]'): confusion_matrix(preds, targs)
    assert confusion_matrix(preds[:1], targs[:1]).tolist()==[[1, 0], [0, 0]]

def test_tables_are_made_where_the_predictions_are():
    preds,targs = torch.zeros(3, 2, device='meta'),torch.tensor([0, 1, 1])
    assert get_num_correct(preds, targs).device.type=='meta'        # a device of its own, without numbers

def test_plot_shows_the_shares_of_rows():
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    ax = plot_confusion_matrix(np.array([[1, 3], [0, 2]]), 'ab', normalize=True)
    assert [(o.get_position(), o.get_text()) for o in ax.texts]==[((0, 0), '0.25'), ((1, 0), '0.75'), ((1, 1), '1.00')]
    assert [o.get_text() for o in ax.get_yticklabels()]==['a', 'b'] and ax.get_ylabel()=='true'
    counts = torch.tensor([[3, 1], [0, 0]])
    told = {}
    for kwargs in (dict(cm=counts), dict(cm=counts, normalize=True), dict(cm=counts/4), dict(cm=counts.double().tolist(), normalize=True)):
        ax = plot_confusion_matrix(**kwargs)
        told[ax.get_title()] = [o.get_text() for o in ax.texts]
        assert ax.images[0].get_array().tolist()==[[0.75, 0.25], [0., 0.]]      # zeros are left out, an empty class does no harm
    assert told=={'Number of images': ['3', '1'], 'Share of each true class': ['0.75', '0.25'], 'Shares': ['0.75', '0.25']}
    assert plot_confusion_matrix(counts, title='mine').get_title()=='mine'
    for bad in torch.zeros(0, 0), torch.zeros(3), torch.zeros(2, 3):
        with pytest.raises(ValueError, match='square'): plot_confusion_matrix(bad)
    plt.close('all')

def test_all_preds_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model.train()
    model[1].eval()                         # one layer is frozen, and stays so
    x,y = torch.randn(10, 4),torch.arange(10)%3
    modes = [m.training for m in model.modules()]
    preds,targs = get_all_preds(model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 3))
    assert [m.training for m in model.modules()]==modes and not preds.requires_grad
    assert torch.equal(targs, y)
    test_near(preds, model.eval()(x), eps=1e-6)
    model.train()
    with pytest.raises(RuntimeError): get_all_preds(model, [(torch.randn(2, 5), y[:2])])
    assert model.training
    ours = module.Sequential(module.Linear(4, 3))
    assert get_all_preds(ours, DataLoader(Dataset(x, y), bs=4))[0].shape==(10, 3)
    assert get_all_preds(nn.Flatten(), [(x, y)])[0].shape==(10, 4)       # without any parameter
    there = nn.Linear(4, 3).to('meta')
    assert {o.device.type for o in get_all_preds(there, [(x, y), (x, y)])}=={'meta'}     # wherever the model is

@given(st.integers(1, 50), st.integers(2, 10), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_num_correct_is_accuracy_times_n(n, c, seed):
    g = torch.Generator().manual_seed(seed)
    preds,targs = torch.randn(n, c, generator=g),torch.randint(c, (n,), generator=g)
    assert get_num_correct(preds, targs).item()==round(accuracy(preds, targs).item()*n)
    assert get_num_correct(preds, targs)==confusion_matrix(preds, targs).trace()

def test_network_wants_a_batch():
    for shape in (1,28,28), (28,28), (100,28,28):
        with pytest.raises(ValueError, match=r'a batch of images is wanted, \(bs, 1, 28, 28\)'): Network()(torch.zeros(shape))
    assert Network()(torch.zeros(0,1,28,28)).shape==(0,10)

if __name__=='__main__':
    torch.set_num_threads(1)
    folders = {how: Path(sys.argv[1])/how for how in ('plain', 'checkpoints', 'writes', 'watched')}
    for o in folders.values(): o.mkdir()
    print(json.dumps(dict(plain=killed_again_and_again(folders['plain'], False),
                          checkpoints=killed_again_and_again(folders['checkpoints'], True),
                          writes=dying_writes(folders['writes']), watched=killed_while_watched(folders['watched']))))
