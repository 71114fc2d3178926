"""Measure the library against its peers, side by side on two cores, and say which goals it reaches.

    python tools/bench.py                     all rows, seven minutes; results go to _bench/
    python tools/bench.py --rows loop optim   only these
    python tools/bench.py --quick             small sizes and few rounds: a look, not a verdict
    python tools/bench.py --save              all rows, and put the table into docs/benchmarks.md

A row lets its sides take turns, A B A B …, in one process (or in fresh ones, where a process is what is measured), after
a turn that does not count. Each round gives one ratio; a row reports their median and quartiles. The garbage collector
runs before each turn and not within it."""
import argparse, gc, json, os, platform, subprocess, sys, tempfile, threading, time, warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles

CORES = 2
os.environ['OMP_NUM_THREADS'] = str(CORES)      # before NumPy and PyTorch read it
ROOT = Path(__file__).resolve().parent.parent
OUT, PAGE = ROOT/'_bench', ROOT/'docs'/'benchmarks.md'
PEERS = dict(fastai='fastai', lightning='pytorch-lightning', sklearn='scikit-learn')
ROWS = {}

# ---- what a row is, and how it is measured

def stopwatch(f):
    "Seconds that a call of `f` takes"
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    finally: gc.enable()

def told(f):
    "What `f` says it measured"
    return f()

@dataclass
class Match:
    "Sides that do the same work, ours first, and the goal: a ratio to each peer of at most or at least so much"
    what: str               # the work, with its sizes
    sides: dict             # name -> function; the first is ours
    most: float = None      # goal for ours/peer …
    least: float = None     # … or for peer/ours, how many times faster; a dict gives each peer its own
    threads: int = CORES    # for all sides; 1 where two would only wait for each other
    fastest: bool = False   # compare with the fastest peer only?
    clock: Callable = stopwatch     # calls a side and returns a number: seconds, unless …
    unit: str = 's'         # … this says 'B' (bytes)
    rounds: int = 9         # at least so many …
    seconds: float = 10.    # … and more until this time is over
    warm: bool = True       # begin with a turn that does not count?
    value: Callable = None  # takes the numbers of a round, by side; by default the ratio
    note: Callable = None   # takes the median of each side, and returns a remark

def race(m, rounds, seconds):
    "What each side took in each round: the sides take turns, after a turn that does not count"
    if m.warm: [m.clock(f) for f in m.sides.values()]
    gc.freeze()             # what is there now need not be looked through before each turn
    taken,end = [],time.perf_counter()+seconds
    while len(taken)<rounds or (time.perf_counter()<end and len(taken)<99):
        taken.append({name: m.clock(f) for name,f in m.sides.items()})
    gc.unfreeze()
    return taken

def judge(m, taken):
    "One result for each peer (or for the fastest): median, quartiles, goal and verdict"
    mid = {name: median(t[name] for t in taken) for name in m.sides}
    ours,*peers = m.sides
    if m.fastest: peers = [min(peers, key=mid.get)]
    goals = m.least if m.most is None else m.most
    if not isinstance(goals, dict): goals = dict.fromkeys([''] if m.value else peers, goals)
    for peer,goal in goals.items():
        if m.value: ratios = [m.value(t) for t in taken]
        else: ratios = [t[peer]/t[ours] if m.most is None else t[ours]/t[peer] for t in taken]
        q1,value,q3 = quantiles(ratios, n=4, method='inclusive') if len(ratios)>1 else ratios*3
        yield dict(what=m.what, peer=peer, ours=mid[ours], theirs=mid.get(peer), unit=m.unit, value=value, q1=q1, q3=q3,
                   low=min(ratios), high=max(ratios), rounds=len(taken), threads=m.threads, goal=goal,
                   sign='≤' if m.least is None else '≥', reached=value<=goal if m.least is None else value>=goal,
                   note=m.note(mid) if m.note else '')

def row(f):
    "Makes a function that yields `Match`es a row of the table; it takes `k`, the share of the full sizes to use"
    ROWS[f.__name__] = f
    return f

def sized(n, k, least=128):
    "The share `k` of `n`, but not less than `least`"
    return max(least, int(n*k))

def epoch(dl):
    "One pass over a loader"
    for batch in dl: pass

# ---- the rows

LR = 0.1

def mlp():
    "784-50-10, the same each time"
    from torch import manual_seed, nn
    manual_seed(0)
    return nn.Sequential(nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))

def digits(n):
    "The first `n` digits of MNIST, over and over if need be, as rows of floats, and their labels"
    import torch
    from course_lib.datasets import mnist
    (x,y),_ = mnist()
    rows = torch.arange(n)%len(x)
    return x[rows].flatten(1)/255, y[rows]

def our_fit(x, y, opt_func=None):
    "Learner on the course's DataLoader, no callbacks; by default with the course's SGD"
    from torch.nn.functional import cross_entropy
    from course_lib.dataloader import DataLoader, DataLoaders, Dataset
    from course_lib.learner import Learner
    from course_lib.optim import SGD
    dls = DataLoaders(DataLoader(Dataset(x, y), 64), None)
    learn = Learner(mlp(), dls, cross_entropy, LR, opt_func=opt_func or SGD)
    def fit():
        learn.fit(1, valid=False)
        return learn.model
    return fit

def loop_by_hand(x, y, opt_func=None):
    "The shortest loop, over slices of the tensors, that also says how large the loss was; by default with our SGD"
    from torch.nn.functional import cross_entropy
    from course_lib.optim import SGD
    model = mlp()
    opt = (opt_func or SGD)(model.parameters(), LR)
    def fit():
        total = 0.
        for i in range(0, len(x), 64):
            xb,yb = x[i:i+64],y[i:i+64]
            loss = cross_entropy(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            total = total + loss.detach()*len(xb)
        model.loss = float(total)/len(x)
        return model
    return fit

def fastai_fit(x, y):
    "fastai's Learner on its DataLoader; no progress bar, and no validation"
    import fastai.basics as fa, torch
    class NoValidation(fa.Callback):
        def before_validate(self): raise fa.CancelValidException
    ds = list(zip(x, y))
    dls = fa.DataLoaders.from_dsets(ds, ds[:64], bs=64, shuffle=False, drop_last=False, device=torch.device('cpu'))
    learn = fa.Learner(dls, mlp(), torch.nn.functional.cross_entropy, opt_func=fa.SGD, lr=LR, wd=0., cbs=NoValidation())
    learn.logger = fa.noop
    def fit():
        learn.fit(1)
        return learn.model
    return fit

def lightning_fit(x, y, bare=False):
    "Lightning's Trainer on PyTorch's DataLoader; with its default callbacks (bar, summary, checkpoints), or bare"
    import contextlib, io, logging, torch
    from course_lib.fastai import import_torchvision
    import_torchvision()    # for torchmetrics
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset
    logging.getLogger('pytorch_lightning').setLevel(logging.ERROR)
    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = mlp()
        def training_step(self, batch, i): return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), LR)
    lit,dl = Lit(),DataLoader(TensorDataset(x, y), 64)
    folder = tempfile.TemporaryDirectory(prefix='course_')
    trainer = pl.Trainer(max_epochs=0, accelerator='cpu', logger=False, default_root_dir=folder.name,
                         enable_checkpointing=not bare, enable_progress_bar=not bare, enable_model_summary=not bare)
    def fit():
        trainer.fit_loop.max_epochs += 1
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): trainer.fit(lit, dl)
        return lit.model
    fit.folder = folder     # it is removed with the function
    return fit

def no_loop(x, y):
    "Forward and backward through the same batches, and no more"
    import torch
    model = mlp()
    def run():
        for i in range(0, len(x), 64):
            torch.nn.functional.cross_entropy(model(x[i:i+64]), y[i:i+64]).backward()
            for p in model.parameters(): p.grad = None
    return run

@row
def loop(k=1.):
    "The training loop: one epoch of 200 batches of 64 digits through 784-50-10 with SGD"
    x,y = digits(sized(12_800, k))
    what = f'fit, {len(x)//64} batches of 64, 784-50-10, SGD'
    import torch
    for whose,opt_func in (('ours', None), ("torch's", torch.optim.SGD)):
        sides = {'Learner': our_fit(x, y, opt_func), f'loop by hand, {whose}': loop_by_hand(x, y, opt_func)}
        yield Match(f'{what}; both sides with {whose}', sides, most=1.03, threads=1, seconds=15)
    sides = {'Learner': our_fit(x, y), 'fastai': fastai_fit(x, y), 'Lightning': lightning_fit(x, y),
             'Lightning, bare': lightning_fit(x, y, bare=True), 'no loop': no_loop(x, y)}
    goals = {'fastai': 3., 'Lightning': 3., 'Lightning, bare': 2.5}     # without loop and optimizer it would be about 3
    yield Match(what, sides, least=goals, threads=1, seconds=25,
                note=lambda mid: "forward and backward alone would be "
                                 f"{mid['Lightning, bare']/mid['no loop']:.1f} times faster than bare Lightning")

def stepper(opt_func, params, grads, **hypers):
    "Makes steps of an optimizer on copies of the parameters; returns them"
    ps = [p.detach().clone().requires_grad_() for p in params]
    for p,g in zip(ps, grads): p.grad = g.clone()
    opt = opt_func(ps, **hypers)
    def step():
        opt.step()
        return ps
    return step

@row
def optim(k=1.):
    "One step of an optimizer on the 62 parameters of resnet18, 11.7 million numbers"
    import torch
    from course_lib import optim as ours
    from course_lib.vision import resnet18
    torch.manual_seed(0)
    params = list(resnet18(nf=sized(64, min(1., 16*k), 4)).parameters())
    grads = [torch.randn_like(p.detach())/100 for p in params]
    for name,hypers in dict(SGD=dict(lr=.1, mom=.9), Adam=dict(lr=1e-3), AdamW=dict(lr=1e-3)).items():
        theirs = {'momentum' if h=='mom' else h: v for h,v in hypers.items()}
        peers = {f'torch, {how}': stepper(getattr(torch.optim, name), params, grads, **theirs, **{how: True})
                 for how in ('foreach', 'fused')}
        sides = {name: stepper(getattr(ours, name), params, grads, **hypers), **peers}
        yield Match(f'{name}, one step, resnet18', sides, most=1.05, fastest=True, seconds=8)

def torch_simple_cnn():
    "The layers of `simple_cnn`, by torch.nn"
    from torch import nn
    nfs = [3, 16, 32, 64, 128]
    convs = [o for ni,nf in zip(nfs, nfs[1:]) for o in (nn.Conv2d(ni, nf, 3, stride=2, padding=1), nn.ReLU())]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))

@row
def modules(k=1.):
    "Forward and backward through `simple_cnn`, and through the same layers of torch.nn"
    import torch
    from course_lib.vision import simple_cnn
    torch.manual_seed(0)
    ours,theirs = simple_cnn(),torch_simple_cnn()
    with torch.no_grad():
        for a,b in zip(ours.parameters(), theirs.parameters(), strict=True): b.copy_(a)
    x,y = torch.randn(sized(64, k, 8), 3, 64, 64),torch.randint(10, (sized(64, k, 8),))
    def side(model):
        def run():
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            return list(model.parameters())
        return run
    yield Match(f'simple_cnn, forward and backward, {tuple(x.shape)}', {'Module': side(ours), 'torch.nn': side(theirs)},
                most=1.05, seconds=15)

@row
def batches(k=1.):
    "One epoch of shuffled batches of 64 from tensors in memory; `copy` copies the same bytes, in order"
    import torch
    from torch.utils.data import TensorDataset, DataLoader as TorchLoader
    from course_lib.dataloader import DataLoader, Dataset
    shapes = [((20_000, 10), torch.float32, 20.), ((60_000, 28, 28), torch.uint8, 15.), ((60_000, 784), torch.float32, 8.)]
    for (n,*shape),dtype,goal in shapes:        # large items must at least be copied, so the goal is lower
        x = torch.randint(256, (sized(n, k), *shape)).to(dtype)
        y = torch.arange(len(x))
        sides = {'DataLoader': partial(epoch, DataLoader(Dataset(x, y), 64, shuffle=True)),
                 'torch': partial(epoch, TorchLoader(TensorDataset(x, y), 64, shuffle=True)),
                 'copy': lambda x=x, y=y: [(a.clone(), b.clone()) and None for a,b in zip(x.split(64), y.split(64))]}
        yield Match(f'shuffled batches of 64 of {tuple(x.shape)} {str(dtype)[6:]}', sides, least={'torch': goal},
                    seconds=8, note=lambda mid: f"copying the bytes in order would give {mid['torch']/mid['copy']:.0f}")

def make_jpegs(folder, n):
    "`n` JPEG files, 160 pixels on the short side: mosaics of Fashion-MNIST, each piece in a colour of its own"
    import numpy as np
    from PIL import Image
    from course_lib.datasets import fashion_mnist
    (x,y),_ = fashion_mnist()
    x,rng = x.numpy(),np.random.default_rng(0)
    for i in range(n):
        h,w = (3,4) if i%2 else (4,3)
        pieces = x[rng.integers(len(x), size=h*w)].reshape(h, w, 28, 28).transpose(0,2,1,3).reshape(h*28, w*28)
        tint = rng.uniform(.3, 1, (2,h,w,3)).repeat(28, 1).repeat(28, 2)       # of dark parts, and of bright
        t = pieces[...,None]/255
        a = ((1-t)*tint[0]*120 + t*tint[1]*255).astype(np.uint8)
        short,long = 160,213
        (folder/str(i%10)).mkdir(exist_ok=True)
        im = Image.fromarray(a).resize((long,short) if w>h else (short,long), Image.BICUBIC)
        im.save(folder/str(i%10)/f'{i}.jpg', quality=90)
    return sorted(folder.rglob('*.jpg'))

def our_images(files):
    from course_lib.dataloader import DataLoader
    from course_lib.vision import ImageDataset
    return DataLoader(ImageDataset(files), 64, n_workers=CORES)

def torch_images(files):
    from course_lib.vision import ImageDataset
    from torch.utils.data import DataLoader
    return DataLoader(ImageDataset(files), 64, num_workers=CORES, persistent_workers=True)

def fastai_images(files):
    "fastai's own pipeline, to the same pixels: squished, and floats from 0 to 1"
    import torch
    from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter, parent_label
    from fastai.vision.data import ImageBlock
    from course_lib.fastai import import_torchvision
    import_torchvision()
    from fastai.vision.augment import Resize
    block = DataBlock((ImageBlock, CategoryBlock), splitter=IndexSplitter([]), get_y=parent_label,
                      item_tfms=Resize(64, method='squish'))
    return block.dataloaders(files, bs=64, num_workers=CORES, persistent_workers=True, shuffle=False, drop_last=False,
                             device=torch.device('cpu')).train

def no_loader(files):
    "The items alone, in two processes that each make every second one and send nothing"
    import multiprocessing as mp
    from course_lib.vision import ImageDataset
    ds,context = ImageDataset(files),mp.get_context('fork')
    starts,ends = context.SimpleQueue(),context.SimpleQueue()
    def work(first):
        while True:
            starts.get()
            for i in range(first, len(ds), CORES): ds[i]
            ends.put(first)
    processes = [context.Process(target=work, args=(i,), daemon=True) for i in range(CORES)]
    for o in processes: o.start()
    def run():
        for _ in processes: starts.put(None)
        for _ in processes: ends.get()
    run.processes = processes
    return run

@row
def images(k=1.):
    "One epoch over JPEG files: decode, resize to 64×64, batches of 64 by two workers that live on from epoch to epoch"
    with tempfile.TemporaryDirectory(prefix='course_') as folder:
        files = make_jpegs(Path(folder), sized(4_000, k))
        sides = {name: partial(epoch, make(files)) for name,make in
                 {'DataLoader': our_images, 'torch': torch_images, 'fastai': fastai_images}.items()}
        sides['no loader'] = alone = no_loader(files)
        yield Match(f'{len(files):,} JPEGs of 160×213 to 64×64, 2 workers', sides, least={'torch': 0.95, 'fastai': 1.},
                    threads=1, seconds=45, note=lambda mid: "the items alone, without a loader, would be "
                                                            f"{mid['torch']/mid['no loader']:.2f} times faster than torch")
        for o in alone.processes: o.terminate()

@row
def baseline(k=1.):
    "Which of ten classes has the nearest mean, for 10,000 digits"
    import torch
    from course_lib.baseline import PixelSimilarity
    from sklearn.neighbors import NearestCentroid
    x,y = digits(sized(60_000, k, 4_000))
    test = x[:sized(10_000, k)].clone()
    ours,theirs = PixelSimilarity().fit(x, y),NearestCentroid().fit(x.numpy(), y.numpy())
    sides = {'PixelSimilarity': lambda: ours.predict(test),
             'scikit-learn': lambda: torch.from_numpy(theirs.predict(test.numpy()))}
    yield Match(f'nearest of 10 means, {len(test):,} images of 784 floats', sides, least=1., seconds=6)

@row
def speedrun(k=1.):
    "MNIST from bytes in memory: chapter 21's recipe for 99 %, and chapter 17's for 96 %"
    import torch
    from course_lib.datasets import mnist
    from course_lib.dataloader import Dataset
    from course_lib.pytorch import DataBunch, fit, get_dls, get_model
    from course_lib.speedrun import speed_learner
    (x,y),test = mnist()
    n,seeds = sized(50_000, k, 512),iter(range(10**6))
    def record():
        torch.manual_seed(seed := next(seeds))
        learn = speed_learner(Dataset(x[:n], y[:n]), Dataset(*test), seed)
        learn.fit(1, valid=False)
        learn.fit(1, train=False)
        return learn.history[-1]['acc']
    def classic():
        torch.manual_seed(next(seeds))
        rows = x.flatten(1)/256
        valid = slice(50_000, 50_000+n//5)
        db = DataBunch(*get_dls(Dataset(rows[:n], y[:n]), Dataset(rows[valid], y[valid]), bs=16))
        model,opt = get_model(db, lr=0.125)
        return fit(3, model, torch.nn.functional.cross_entropy, opt, db.train_dl, db.valid_dl, say=None)[1]
    yield Match('99 % on MNIST, against 96 %', {'speed_learner': record, 'classic recipe': classic}, most=.5, threads=1,
                rounds=7, seconds=0)

def child(*args):
    "What a fresh process prints, as a number"
    out = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    if out.returncode: sys.exit(f'bench: a process that measures failed:\n{out.stderr}')
    return float(out.stdout.split()[-1])

def import_time(line):
    "Seconds that an import takes in a fresh process that has imported torch"
    return child('-c', f'import time, torch; start = time.perf_counter(); {line}; print(time.perf_counter()-start)')

@row
def imports(k=1.):
    "`import course_lib.learner`, beyond `import torch`, in fresh processes"
    sides = {'course_lib': partial(import_time, 'import course_lib.learner'), '0.15 s': lambda: 0.15,
             'fastai.basics': partial(import_time, 'from fastai.basics import *')}
    yield Match('import course_lib.learner, beyond torch', sides, least={'0.15 s': 1., 'fastai.basics': 5.},
                clock=told, rounds=7, seconds=0)

def held(f):
    "Most bytes that `f` had allocated at once, for tensors and for Python's objects, beyond what was there"
    import tracemalloc
    from torch.profiler import ProfilerActivity, profile
    f()                     # what a first call leaves behind in caches does not count
    tracemalloc.start()
    f()
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: f()
    events = sorted((o.start_ns(), o.nbytes()) for o in p.profiler.kineto_results.events() if o.name()=='[memory]')
    now = peak = 0
    for _,n in events:
        now += n
        peak = max(peak, now)
    return python + peak

def memory_of(process):
    "Bytes that a process takes; on Linux, memory that several share is divided among them"
    m = process.memory_full_info() if sys.platform=='linux' else process.memory_info()
    return getattr(m, 'pss', m.rss)

def grown(f):
    "Bytes by which this process and its workers grew while `f` ran, at the most; what they share counts once"
    import psutil
    me,done,sizes = psutil.Process(),threading.Event(),[]
    def look():
        try: sizes.append(sum(map(memory_of, [me, *me.children()])))
        except psutil.Error: pass       # a worker ended meanwhile
    def watch():
        while not done.wait(0.05): look()
    look()
    watcher = threading.Thread(target=watch)
    watcher.start()
    f()
    done.set()
    watcher.join()
    look()
    return max(sizes) - sizes[0]

def in_child(name, n, folder=''):
    "In a fresh process: warm up, and print how many bytes the side `name` takes for `n` items"
    import torch
    torch.set_num_threads(1)
    if name.startswith('images'):
        files = sorted(Path(folder).rglob('*.jpg'))
        epoch(our_images(files))
        print(grown(partial(epoch, our_images(files*(n//len(files))))))
    else:
        side = {'ours': our_fit, 'by hand': loop_by_hand}[name.split('/')[1]]
        x,y = digits(n)
        side(x[:6400], y[:6400])()
        print((held if name.startswith('held') else grown)(side(x, y)))

IN_CHILD = dict(threads=1, clock=told, unit='B', rounds=3, seconds=0, warm=False)

def bytes_in_child(name, n, folder=''): return child(__file__, '--child', name, n, folder)

@row
def memory(k=1.):
    "Most memory allocated at once in an epoch of the row `loop`, beyond model, data and batch"
    n = sized(12_800, k)
    sides = {'Learner': partial(bytes_in_child, 'held/ours', n),
             'loop by hand': partial(bytes_in_child, 'held/by hand', n)}
    yield Match(f'peak of a fit, {n//64} batches of 64, beyond model and data', sides, most=1.1, **IN_CHILD)

def growths(what, n, make, n_bytes, taken_by, **kwargs):
    "Two matches: time and memory of the sides that `make` makes for `n`, 4 times and 16 times as many items"
    times = {f'{s}×': make(s*n) for s in (16,4,1)}
    yield Match(f'{what}: time per item from 4× to 16× over that from 1× to 4×', times, most=1.1, threads=1,
                note=straight, value=lambda t: (t['16×']-t['4×']) / (t['4×']-t['1×']) / 4, **kwargs)
    takes = {f'{s}×': partial(taken_by, s*n) for s in (16,1)}
    yield Match(f'{what}: memory that 16× takes beyond 1×, as a share of the data', takes, most=0.01,
                value=lambda t: (t['16×']-t['1×']) / (15*n_bytes), **IN_CHILD)

def straight(mid):
    "How straight the line of times over sizes is: R²"
    import numpy as np
    return f"R² {np.corrcoef([int(name[:-1]) for name in mid], list(mid.values()))[0,1]**2:.4f}"

@row
def growth(k=1.):
    "The work of `loop` and `images` at 1×, 4× and 16× the data: time in a straight line, memory that does not grow"
    n = sized(12_800, k)
    x,y = digits(16*n)
    yield from growths(f'fit, {n:,} digits', n, lambda n: our_fit(x[:n], y[:n]), n*(784*4+8),
                       partial(bytes_in_child, 'grown/ours'), rounds=7, seconds=10)
    with tempfile.TemporaryDirectory(prefix='course_') as folder:
        n = sized(1_000, k)
        files = make_jpegs(Path(folder), n)
        yield from growths(f'{n:,} JPEGs', n, lambda n: partial(epoch, our_images(files*(n//len(files)))),
                           sum(f.stat().st_size for f in files), lambda n: bytes_in_child('images', n, folder),
                           rounds=3, seconds=0)

# ---- the table, the chart and the page

def amount(v, unit):
    "A number with its unit, three digits"
    if v is None: return ''
    scale = [(1e6,'MB'), (1e3,'kB'), (1,'B')] if unit=='B' else [(1,'s'), (1e-3,'ms'), (1e-6,'µs')]
    size,name = next((o for o in scale if abs(v)>=o[0]), scale[-1])
    return f'{v/size:.3g} {name}'

def cells(r):
    "The cells of a result's line in the table"
    goal = f"{r['sign']} {r['goal']:g}" if r['goal'] is not None else ''
    verdict = '' if r['goal'] is None else 'reached' if r['reached'] else 'falls short'
    spread = f"{r['value']:.3g} ({r['q1']:.3g}–{r['q3']:.3g})"
    what = r['what'] + (f"; {r['note']}" if r['note'] else '')
    return [r['row'], what, r['peer'], amount(r['ours'], r['unit']), amount(r['theirs'], r['unit']),
            str(r['threads']), str(r['rounds']), spread, goal, verdict]

HEAD = 'row|work|peer|ours|peer’s|threads|rounds|ratio (quartiles)|goal|verdict'.split('|')

def markdown(results, machine):
    "The table as a page shows it, and the machine it was read on"
    lines = [HEAD, ['---']*len(HEAD), *map(cells, results)]
    return '\n'.join('| ' + ' | '.join(o) + ' |' for o in lines) + f'\n\nRead on {machine}.\n'

def draw(results, path):
    "A bar for each result: by which factor it is better than its goal, or worse"
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch
    shown = [r for r in results if r['goal']][::-1]
    factors = [r['goal']/max(r['value'], 1e-3) if r['sign']=='≤' else r['value']/r['goal'] for r in shown]
    looks = {True: dict(color='#0072B2'), False: dict(color='#E69F00', hatch='//')}
    fig,ax = plt.subplots(figsize=(11, 1.6+.38*len(shown)), layout='constrained')
    for i,(r,f) in enumerate(zip(shown, factors)):
        ax.barh(i, f-1, left=1, **looks[r['reached']])
        ax.annotate(f" {r['value']:.3g} (goal {r['sign']} {r['goal']:g}) ", (f,i), va='center', size=8,
                    ha='left' if f>=1 else 'right')
    names = [f"{r['row']}: {r['what']}" + f"\nagainst {r['peer']}"*bool(r['peer']) for r in shown]
    ax.set_yticks(range(len(shown)), names, size=7)
    ax.set_xscale('log')
    ax.xaxis.set_major_formatter('{x:g}')
    ax.xaxis.set_minor_formatter('')
    ax.axvline(1, color='black', lw=1)
    ax.set_xlim(min(factors)/3, max(factors)*3)
    ax.set(title='How far each ratio is on the good side of its goal',
           xlabel='factor, logarithmic; 1 is the goal itself')
    handles = [Patch(label=label, **looks[reached]) for reached,label in ((True,'reached'), (False,'falls short'))]
    ax.legend(handles=handles, loc='lower right')
    fig.savefig(path, dpi=100)
    plt.close(fig)

def machine():
    "What the figures were read on, in a line"
    import torch
    cpu = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
        named = [o for o in lines if o.startswith('model name')]
        if named: cpu = named[0].split(':')[1].strip()
    peers = ', '.join(f'{name} {version(name)}' for name in ('torch', *PEERS.values()))
    return (f'{CORES} cores of {cpu}, {platform.system()}, Python {platform.python_version()}, {peers}, '
            f'{time.strftime("%Y-%m-%d")}')

def save_page(table, page=None):
    "Replace what stands between the page's marks by `table`"
    page = page or PAGE
    begin,end = '<!-- table: made by `python tools/bench.py --save` -->\n','<!-- end of the table -->'
    text = page.read_text(encoding='utf-8')
    if text.count(begin)!=1 or text.count(end)!=1:
        sys.exit(f'bench: {page.name} needs the lines {begin.strip()} and {end}, once')
    before,_,rest = text.partition(begin)
    page.write_text(f'{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}', encoding='utf-8')

# ---- the command

def install_peers():
    "Install the peers into this environment, once"
    try:
        for name in PEERS.values(): version(name)
    except PackageNotFoundError:
        import env
        from configparser import ConfigParser
        config = ConfigParser(delimiters=['='])
        config.read(ROOT/'settings.ini', encoding='utf-8')
        print('Installing the libraries to compare with, once ...', flush=True)
        pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'install', '--retries', '2']
        rc,out = env.run(*pip, '-c', 'constraints.txt', *config['DEFAULT']['bench_requirements'].split())
        if rc: env.stop(env.why(out) + ' (Everything pip said: .venv-install.log)')
        os.remove(env.LOG)

def measure(names, k, quick=False, threads=None):
    "The results of the rows `names`, each printed as it comes"
    import torch
    from threadpoolctl import threadpool_limits     # for NumPy and scikit-learn
    for name in names:
        try:
            for m in ROWS[name](k):
                m.threads = threads or m.threads
                torch.set_num_threads(m.threads)
                with threadpool_limits(m.threads): taken = race(m, 3 if quick else m.rounds, 0 if quick else m.seconds)
                for r in judge(m, taken):
                    r |= dict(row=name, all=taken)
                    print('  '.join(o for o in cells(r) if o), flush=True)
                    yield r
        except ImportError as e: sys.exit(f'bench: the row {name} needs {e.name}: run make bench, which installs it')

def main():
    p = argparse.ArgumentParser(description='Measure the library against its peers, side by side.')
    p.add_argument('--rows', nargs='+', choices=ROWS, default=list(ROWS), metavar='ROW', help=', '.join(ROWS))
    p.add_argument('--quick', action='store_true', help='small sizes, few rounds: a look, not a verdict')
    p.add_argument('--save', action='store_true', help='put the table into docs/benchmarks.md')
    p.add_argument('--threads', type=int, help='threads for all rows; 1 where other programs keep the cores busy')
    p.add_argument('--child', nargs=3, metavar=('SIDE', 'N', 'FOLDER'), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child: return in_child(args.child[0], int(float(args.child[1])), args.child[2])
    if args.save and (args.quick or args.threads or set(args.rows)!=set(ROWS)):
        sys.exit('bench: --save needs all rows, as they are')
    install_peers()
    warnings.simplefilter('ignore')
    if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    start = time.time()
    results = list(measure(args.rows, 1/16 if args.quick else 1., args.quick, args.threads))
    OUT.mkdir(exist_ok=True)
    table = markdown(results, machine())
    figures = dict(machine=machine(), quick=args.quick, results=results)
    (OUT/'bench.json').write_text(json.dumps(figures, indent=1), encoding='utf-8')
    (OUT/'bench.md').write_text(table, encoding='utf-8')
    draw(results, OUT/'bench.png')
    if args.save: save_page(table)
    short = [f"{r['row']}, {r['what']}, {r['peer']}: {r['value']:.3g}, wanted {r['sign']} {r['goal']:g}"
             for r in results if not r['reached']]
    print(f'\n{len(results)} results in {time.time()-start:.0f} s; table, figures and chart are in {OUT.name}/')
    if short: print('fall short:\n  ' + '\n  '.join(short))

if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')    # what a terminal or file cannot take, such as × where it is ASCII, becomes a question mark
    main()
