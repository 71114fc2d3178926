"What 17_pytorch cannot show in a cell: its links, odd batches, processes, and whatever else fit may be given"
import importlib.util, re
from pathlib import Path

import nbformat, numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn, optim
from torch.utils import data as torch_data

from course_lib.core import set_seed, test_near as near
from course_lib.dataloader import DataLoader, DataLoaders, Dataset
from course_lib.learner import Learner
from course_lib.losses import accuracy, cross_entropy
from course_lib.module import Linear, ReLU, Sequential
from course_lib.optim import SGD
from course_lib.pytorch import DataBunch, fit, get_dls, get_model

steady = settings(max_examples=25, deadline=None, derandomize=True, database=None)
NB = 'nbs/17_pytorch.ipynb'

def points(n, seed=0, c=3):
    "n items of 6 numbers, in c classes that a net can tell apart"
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % c
    return Dataset(torch.randn(n, 6, generator=rng) + 2*F.one_hot(y, 6), y)

def bunch(n=60, n_valid=31, bs=8): return DataBunch(*get_dls(points(n), points(n_valid, 1), bs))

# ---- the table: ours · PyTorch's ----

def table(root):
    "The rows of the table, as lists of (name, address) for its first two columns"
    text = '\n'.join(c.source for c in nbformat.read(root/NB, as_version=4).cells if c.cell_type=='markdown')
    lines = text.partition("| ours | PyTorch's | PyTorch's behaves differently |\n|---|---|---|\n")[2].partition('\n\n')[0]
    rows = re.findall(r"^\| (.*?) \| (.*?) \|.*\|$", lines, re.M)
    return [[re.findall(r'\[`?([^\]`]+)`?\]\(([^)]+)\)', cell) for cell in row] for row in rows]

def test_our_side_of_the_table_is_where_it_says(root):
    rows = table(root)
    assert len(rows)>=20
    for ours,_ in rows:
        assert ours
        for name,file in ours:
            module = importlib.import_module(f"course_lib.{Path(file).stem.partition('_')[2]}")
            assert name in module.__all__ and (root/'nbs'/file).exists(), (name, file)

def test_pytorchs_side_of_the_table_is_where_it_says(root):
    "Each link leads to the line of the definition, in the files of the version that it names"
    checked,form = 0,r'https://github\.com/pytorch/(\w+)/blob/v([\d.]+)/([\w/.]+?)(?:#L(\d+))?'
    for name,url in [link for _,theirs in table(root) for link in theirs]:
        package,tag,path,line = re.fullmatch(form, url).groups()
        package = {'pytorch': 'torch', 'vision': 'torchvision'}[package]
        spec = importlib.util.find_spec(package)        # it is not imported
        if spec is None or line is None: continue       # C++ files are not installed
        folder = Path(spec.origin).parent
        version = re.search(r"__version__ = '([\d.]+)", (folder/'version.py').read_text())[1]
        if version!=tag: continue
        got = (folder.parent/path).read_text(encoding='utf-8').splitlines()[int(line)-1]
        assert re.match(rf"\s*(class|def) {name.split('.')[-1]}\b", got), (name, url, got)
        checked += 1
    assert checked>=20 or torch.__version__.split('+')[0]!='2.13.0'

# ---- loaders ----

@steady
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 17))
def test_each_item_comes_once_whatever_the_sizes(n, n_valid, bs):
    train,valid = get_dls(points(n), points(n_valid, 1), bs)
    batches = [xb for xb,_ in train]
    assert [len(o) for o in batches] == [bs]*(n//bs) + [n%bs]*(n%bs>0)
    assert sorted(torch.cat(batches).tolist())==sorted(points(n).x.tolist())
    for a,b in zip(valid, DataLoader(points(n_valid, 1), bs*2), strict=True): assert all(map(torch.equal, a, b))

def test_a_seed_gives_an_order_and_each_epoch_another():
    dl,_ = get_dls(points(50), points(5), 10)
    def epoch(): return torch.cat([xb for xb,_ in dl])
    set_seed(3); a,b = epoch(),epoch()
    set_seed(3); c = epoch()
    assert torch.equal(a, c) and not torch.equal(a, b)

def test_with_workers_the_same_batches_come():
    ds = points(40)
    set_seed(0); alone = list(get_dls(ds, ds, 8)[0])
    set_seed(0); helped = list(get_dls(ds, ds, 8, num_workers=2)[0])
    for a,b in zip(alone, helped, strict=True): assert all(map(torch.equal, a, b))

@pytest.mark.parametrize('kwargs', [dict(sampler=[0, 1]), dict(shuffle=True), dict(batch_size=4),
                                    dict(batch_sampler=[[0, 1]])], ids=lambda o: next(iter(o)))
def test_what_get_dls_chooses_itself_is_refused_by_name(kwargs):
    with pytest.raises(TypeError, match=f'get_dls: {next(iter(kwargs))} cannot be given.*make the two loaders'):
        get_dls(points(20), points(10), 4, **kwargs)

def test_drop_last_leaves_all_of_the_validation_set():
    train,valid = get_dls(points(21), points(21, 1), 5, drop_last=True)
    assert (sum(len(xb) for xb,_ in train), sum(len(xb) for xb,_ in valid))==(20, 21)

def test_numpy_numbers_are_numbers():
    db = DataBunch(*get_dls(points(20), points(10), np.int64(8)), c=np.int32(3))
    assert (len(db.train), db.train.batch_size, db.valid.batch_size, db.c)==(3, 8, 16, 3)
    model,opt = get_model(db, lr=np.float32(0.25), num_hidden_layers=np.int64(4))
    assert type(opt.param_groups[0]['lr']) is float and model[0].out_features==4
    fit(np.int64(1), model, F.cross_entropy, opt, db.train, db.valid, say=None)
    for call in (lambda: get_dls(points(9), points(9), True), lambda: get_model(db, num_hidden_layers=True),
                 lambda: fit(True, model, F.cross_entropy, opt, db.train, db.valid)):
        with pytest.raises(ValueError, match='is True, but a whole number'): call()

def test_bunch_is_a_pair_of_loaders_under_another_name():
    db = bunch()
    assert isinstance(db, DataLoaders) and (db.c, db.train_dl, db.valid_dl)==(3, db.train, db.valid)
    assert repr(db)==('DataBunch\n  train: 8 batches of Dataset of 60 items: x (60, 6) float32, y (60,) int64'
                      '\n  valid: 2 batches of Dataset of 31 items: x (31, 6) float32, y (31,) int64')
    assert get_model(db)[0](torch.ones(2, 6)).shape==(2, 3)
    told = DataBunch(db.train, db.valid, c=7)
    assert get_model(told, num_hidden_layers=4)[0](torch.ones(2, 6)).shape==(2, 7)
    for c in (0, -1, 2.5, '3'):
        with pytest.raises(ValueError, match='DataBunch: c is .*, but a whole number'): DataBunch(db.train, db.valid, c)

# ---- fit ----

@steady
@given(st.integers(1, 40), st.integers(1, 17))
def test_each_sample_counts_the_same(n_valid, bs):
    "Loss and accuracy are those of all samples at once, however the validation set is cut into batches"
    model,valid = nn.Linear(6, 3),points(n_valid, 1)
    opt = optim.SGD(model.parameters(), lr=0.1)
    loss,acc = fit(1, model, F.cross_entropy, opt, [valid[:4]], DataLoader(valid, bs), say=None)
    with torch.no_grad(): preds = model(valid.x)
    near(loss, F.cross_entropy(preds, valid.y), eps=1e-5)
    near(acc, accuracy(preds, valid.y), eps=1e-6)

def test_dropout_and_batchnorm_see_the_right_mode():
    "Validation changes nothing in the model, and the last state is eval"
    set_seed(0)
    db = bunch()
    model = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Dropout(0.5), nn.Linear(20, 3))
    loss,acc = fit(3, model, F.cross_entropy, optim.SGD(model.parameters(), 0.1), db.train, db.valid, say=None)
    assert model[1].num_batches_tracked==3*len(db.train) and not any(m.training for m in model.modules())
    near(loss, F.cross_entropy(model(db.valid_ds.x), db.valid_ds.y), eps=1e-5)

@pytest.mark.parametrize('opt_func', [optim.SGD, SGD])
def test_gradients_that_were_left_over_change_nothing(opt_func):
    "They may come from a backward of the user's own, or from a fit that was interrupted"
    ends = []
    for left in (False, True):
        set_seed(0)
        db = bunch()
        model = get_model(db)[0]
        opt = opt_func(list(model.parameters()), lr=0.1)
        if left: F.cross_entropy(model(db.train_ds.x), db.train_ds.y).backward()
        fit(1, model, F.cross_entropy, opt, db.train, db.valid, say=None)
        assert all(p.grad is None for p in model.parameters())      # and it leaves none
        ends.append([p.detach() for p in model.parameters()])
    for a,b in zip(*ends): assert torch.equal(a, b)

class Slotted:
    "An optimizer without a __dict__"
    __slots__ = 'params','lr'
    def __init__(self, params, lr): self.params,self.lr = list(params),lr
    @torch.no_grad()
    def step(self):
        for p in self.params: p -= self.lr*p.grad
    def zero_grad(self):
        for p in self.params: p.grad = None

class Bare(Slotted):
    "One that does not tell what it trains"
    __slots__ = 'hidden',
    def __init__(self, params, lr): self.hidden,self.lr = list(params),lr
    params = property(lambda self: ())
    def step(self):
        with torch.no_grad():
            for p in self.hidden: p -= self.lr*p.grad
    def zero_grad(self):
        for p in self.hidden: p.grad = None

@pytest.mark.parametrize('kind', [Slotted, Bare])
def test_any_object_with_step_and_zero_grad_will_do(kind):
    ends = []
    for opt_func in (optim.SGD, kind):
        set_seed(0)
        db = bunch()
        model = get_model(db)[0]
        ends.append(fit(1, model, F.cross_entropy, opt_func(model.parameters(), lr=0.1), db.train, db.valid, say=None))
    near(*ends, eps=1e-6)
    with pytest.raises(ValueError, match='made for another model'):
        fit(1, model, F.cross_entropy, Slotted(get_model(db)[0].parameters(), 0.1), db.train, db.valid)

def test_dicts_of_inputs_count_by_their_targets():
    "An accuracy is a mean over items, not over the parts of an input"
    class Net(nn.Linear):
        def forward(self, b): return super().forward(b['x'])
    x,y = points(30)[:]
    batches = [({'x': x[i:j], 'name': i}, y[i:j]) for i,j in ((0, 20), (20, 30))]
    model = Net(6, 3)
    loss,acc = fit(1, model, F.cross_entropy, optim.SGD(model.parameters(), 0.1), batches, batches, say=None)
    with torch.no_grad(): preds = model({'x': x})
    near((loss, acc), (F.cross_entropy(preds, y), accuracy(preds, y)), eps=1e-6)

def test_it_says_one_line_per_epoch_or_nothing(capsys):
    db = bunch()
    model,opt = get_model(db, lr=0.1)
    loss,acc = fit(2, model, F.cross_entropy, opt, db.train, db.valid)
    lines = capsys.readouterr().out.splitlines()
    assert [o[:8] for o in lines]==['epoch 0:', 'epoch 1:']
    assert lines[1].endswith(f'loss {loss:.4f}, accuracy {acc:.4f}')
    assert type(loss) is type(acc) is float
    fit(1, model, F.cross_entropy, opt, db.train, db.valid, say=None)
    assert capsys.readouterr().out==''

@pytest.mark.parametrize('opt_func', [optim.SGD, SGD])
def test_fit_and_learner_agree_bit_by_bit(opt_func):
    "With PyTorch's model and with ours, two epochs, loaders with a short last batch"
    def ours(): return Sequential(Linear(6, 10), ReLU(), Linear(10, 3))
    def torchs(): return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    for make in (ours, torchs):
        db = bunch(61)
        set_seed(5); a = make()
        loss,_ = fit(2, a, cross_entropy, opt_func(list(a.parameters()), lr=0.1), db.train, db.valid, say=None)
        set_seed(5); learn = Learner(make(), db, cross_entropy, lr=0.1, opt_func=opt_func)
        learn.fit(2)
        assert learn.history[-1]['loss']==pytest.approx(loss, rel=1e-6)     # n_items*loss is rounded by `fit` before it is added
        for p,q in zip(a.parameters(), learn.model.parameters(), strict=True): assert torch.equal(p, q)

def test_fit_learns():
    db = bunch(300, 90)
    set_seed(0)
    model,opt = get_model(db, lr=0.1)
    before = accuracy(model(db.valid_ds.x), db.valid_ds.y)
    assert fit(4, model, F.cross_entropy, opt, db.train, db.valid, say=None)[1] > max(0.8, before+0.2)

def test_a_strangers_optimizer_is_refused_before_any_step():
    db = bunch()
    model,other = get_model(db),get_model(db)
    for opt in (other[1], SGD(other[0].parameters(), lr=0.1)):
        with pytest.raises(ValueError, match='made for another model'):
            fit(1, model[0], F.cross_entropy, opt, db.train, db.valid, say=None)
    assert all(p.grad is None for p in model[0].parameters())
    part = optim.SGD(model[0][2].parameters(), lr=0.1)          # the last layer only: that is done on purpose
    fit(1, model[0], F.cross_entropy, part, db.train, db.valid, say=None)

@pytest.mark.parametrize('bad,message', [
    (dict(n_epochs=0), 'n_epochs is 0'), (dict(n_epochs=-1), 'n_epochs is -1'), (dict(n_epochs=1.5), 'n_epochs is 1.5'),
    (dict(train_dl=[]), 'the training loader gave no batches'),
    (dict(valid_dl=[]), 'the validation loader gave no batches')])
def test_what_cannot_be_fitted_is_named(bad, message):
    db = bunch()
    model,opt = get_model(db)
    args = dict(n_epochs=1, train_dl=db.train, valid_dl=db.valid) | bad
    with pytest.raises(ValueError, match=message):
        fit(model=model, loss_func=F.cross_entropy, opt=opt, say=None, **args)

def test_a_generator_lasts_for_one_epoch():
    db = bunch()
    model,opt = get_model(db)
    with pytest.raises(ValueError, match='training loader gave no batches.*used up'):
        fit(2, model, F.cross_entropy, opt, (b for b in db.train), db.valid, say=None)

# ---- items ----

def test_items_that_are_not_rows_and_targets_that_are_no_classes():
    images = Dataset(torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 1]))
    with pytest.raises(ValueError, match=r'\(1, 2, 2\), but a flat row'): get_model(DataBunch(*get_dls(images, images)))
    floats = Dataset(torch.zeros(4, 5), torch.rand(4))
    with pytest.raises(TypeError, match='cannot tell the number of classes'):
        get_model(DataBunch(*get_dls(floats, floats)))
    pairs = torch_data.TensorDataset(*points(8)[:8])
    assert get_model(DataBunch(*get_dls(pairs, pairs), c=3))[0](torch.ones(1, 6)).shape==(1, 3)
