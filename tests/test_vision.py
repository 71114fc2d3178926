"Images from files: all kinds and sizes, broken ones, worker processes; and networks equal to PyTorch's"
import pickle
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from course_lib import vision
from course_lib.dataloader import BatchError, DataLoader
from course_lib.vision import *

def smooth(rng, h, w):
    "A random picture without sharp edges, (h, w, 3) uint8"
    im = Image.fromarray(rng.integers(0, 256, (4,4,3), dtype=np.uint8))
    return np.asarray(im.resize((w,h), Image.BICUBIC))

def save(folder, name, a, mode='RGB', **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).convert(mode).save(folder/name, **kwargs)
    return folder/name

# ---- files

@pytest.mark.parametrize('mode,suffix', [('RGB','png'), ('L','png'), ('RGBA','png'), ('P','png'), ('1','png'), ('LA','png'),
                                         ('RGB','jpg'), ('L','jpg'), ('CMYK','jpg')])
@pytest.mark.parametrize('want', ['RGB', 'L'])
def test_every_kind_of_file_becomes_the_same_kind_of_tensor(tmp_path, mode, suffix, want):
    f = save(tmp_path/'a', f'x.{suffix}', smooth(np.random.default_rng(0), 50, 70), mode)
    x,y = ImageDataset([f], size=32, mode=want)[0]
    assert x.shape==((3 if want=='RGB' else 1), 32, 32) and x.dtype==torch.float32 and y==0
    assert 0<=x.min() and x.max()<=1 and x.std()>0.02
    b,_ = ImageDataset([f], size=32, mode=want, dtype=torch.uint8)[0]
    assert b.dtype==torch.uint8
    torch.testing.assert_close(b.float()/255, x)

@settings(max_examples=25, deadline=None)
@given(h=st.integers(40, 700), w=st.integers(40, 700), size=st.integers(8, 96), seed=st.integers(0, 99))
def test_reduced_decoding_is_near_full_decoding(tmp_path_factory, h, w, size, seed):
    f = save(tmp_path_factory.mktemp('jpg'), 'x.jpg', smooth(np.random.default_rng(seed), h, w), quality=90)
    full = np.asarray(Image.open(f).convert('RGB').resize((size,size), Image.BILINEAR)).astype(int)
    ours = np.asarray(load_image(f, size)).astype(int)
    assert ours.shape==(size,size,3) and abs(full-ours).mean()<8

def test_pixels_keep_their_places_and_channels(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (16,16,3), dtype=np.uint8)
    x,_ = ImageDataset([save(tmp_path/'a', 'x.png', a)], size=16)[0]
    for c in range(3):
        for i,j in [(0,0), (3,11), (15,2)]: assert round(x[c,i,j].item()*255)==a[i,j,c]

def test_labels_and_classes(tmp_path):
    files = [Path(o) for o in ('train/b/1.png', 'train/a/1.png', 'val/b/2.png')]
    train,valid = split_files(files)
    ds = ImageDataset(train)
    assert ds.classes==['a','b'] and ds.y.tolist()==[1,0] and ds.y.dtype==torch.int64
    assert ImageDataset(valid, ds.classes).y.tolist()==[1]
    assert ImageDataset(train, ['b','a']).y.tolist()==[0,1]
    assert ImageDataset(train, label=lambda f: f.parent.parent.name).classes==['train']
    with pytest.raises(ValueError, match="label 'b', and the classes are 'a'"): ImageDataset(train, ['a'])
    with pytest.raises(ValueError, match="of 'x', but train, val, valid are known"): split_files(['x/a/1.png'])
    assert split_files(['x/a/1.png'], train='x')==([Path('x/a/1.png')], [])

# ---- broken files and workers

@pytest.mark.parametrize('content', [b'', b'not an image', b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff\xe0'])
@pytest.mark.parametrize('n_workers', [0, 1])
def test_a_broken_file_is_named(tmp_path, content, n_workers):
    a = smooth(np.random.default_rng(0), 20, 20)
    files = [save(tmp_path/'a', f'{i}.png', a) for i in range(4)]
    files[2].write_bytes(content)
    dl = DataLoader(ImageDataset(files, size=8), bs=2, n_workers=n_workers)
    with pytest.raises(BatchError, match=r'item 2 failed.*2\.png cannot be read as an image'): list(dl)

def test_truncated_jpeg_is_named(tmp_path):
    f = save(tmp_path/'a', 'x.jpg', smooth(np.random.default_rng(0), 200, 200))
    f.write_bytes(f.read_bytes()[:-800])
    with pytest.raises(ImageError, match=r'x\.jpg cannot be read'): ImageDataset([f])[0]

def test_workers_and_pickle_give_the_same(tmp_path):
    rng = np.random.default_rng(0)
    ds = ImageDataset([save(tmp_path/f'{i%3}', f'{i}.jpg', smooth(rng, 30+i, 40)) for i in range(20)], size=16)
    here = list(DataLoader(ds, bs=6, shuffle=True, seed=1))
    there = list(DataLoader(pickle.loads(pickle.dumps(ds)), bs=6, shuffle=True, seed=1, n_workers=2))
    assert len(here)==len(there)==4
    for (x,y),(x2,y2) in zip(here, there): assert torch.equal(x, x2) and torch.equal(y, y2)

def test_no_file_stays_open(tmp_path, recwarn):
    ds = ImageDataset([save(tmp_path/'a', 'x.png', smooth(np.random.default_rng(0), 20, 20))], size=8)
    for _ in range(3): ds[0]
    assert not [w for w in recwarn if issubclass(w.category, ResourceWarning)]

# ---- which data

def test_imagenette_only_if_there_or_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(vision, 'get_data', lambda name: asked.append(name) or tmp_path)
    monkeypatch.setenv('COURSE_HOME', str(tmp_path/'home'))
    monkeypatch.delenv('COURSE_IMAGENETTE', raising=False)
    monkeypatch.setenv('COURSE_DATA', str(tmp_path/'data'))
    assert imagenette_or_fashion()[1].startswith('Fashion') and asked==['fashion_files']
    monkeypatch.setenv('COURSE_IMAGENETTE', '1')
    assert imagenette_or_fashion()[1].startswith('Imagenette') and asked[1:]==['imagenette_160']
    monkeypatch.delenv('COURSE_IMAGENETTE')
    there = tmp_path/'data'/'imagenette2-160'
    for o in ('train','val'): (there/o).mkdir(parents=True)
    assert imagenette_or_fashion()==(there, 'Imagenette, photos at 160 pixels') and len(asked)==2

# ---- networks

class Block(nn.Module):
    "The block of torchvision's resnet18, written down from the paper"
    def __init__(self, ni, nf, stride):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(ni, nf, 3, stride, 1, bias=False),nn.BatchNorm2d(nf)
        self.conv2,self.bn2 = nn.Conv2d(nf, nf, 3, 1, 1, bias=False),nn.BatchNorm2d(nf)
        if ni!=nf or stride!=1:
            self.downsample = nn.Sequential(nn.Conv2d(ni, nf, 1, stride, bias=False), nn.BatchNorm2d(nf))
    def forward(self, x):
        skip = self.downsample(x) if hasattr(self, 'downsample') else x
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + skip).relu()

def torch_resnet18(n_in, n_out, nf):
    return nn.Sequential(nn.Conv2d(n_in, nf, 7, 2, 3, bias=False), nn.BatchNorm2d(nf), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        Block(nf, nf, 1), Block(nf, nf, 1), Block(nf, nf*2, 2), Block(nf*2, nf*2, 1), Block(nf*2, nf*4, 2),
        Block(nf*4, nf*4, 1), Block(nf*4, nf*8, 2), Block(nf*8, nf*8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(nf*8, n_out))

def torch_simple(n_in, n_out):
    nfs = [n_in, 16, 32, 64, 128]
    convs = [o for a,b in zip(nfs, nfs[1:]) for o in (nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, n_out))

@pytest.mark.parametrize('ours,theirs,size', [
    (lambda: resnet18(3, 10, 16), lambda: torch_resnet18(3, 10, 16), 64),
    (lambda: resnet18(1, 2, 8), lambda: torch_resnet18(1, 2, 8), 28),
    (lambda: simple_cnn(3, 10), lambda: torch_simple(3, 10), 64)])
def test_networks_equal_pytorch(ours, theirs, size):
    torch.manual_seed(0)
    a,b = ours().to(torch.float64),theirs().double()
    assert [tuple(o.shape) for o in a.state_dict().values()]==[tuple(o.shape) for o in b.state_dict().values()]
    a.load_state_dict(dict(zip(a.state_dict(), b.state_dict().values())))      # the same order, so weights can be taken over
    x,y = torch.randn(4, next(a.parameters()).shape[1], size, size).double(),torch.tensor([0, 1, 1, 0])
    for training in (True, False):
        a.train(training); b.train(training)
        a.zero_grad(); b.zero_grad()
        pa,pb = a(x),b(x)
        torch.testing.assert_close(pa, pb)
        F.cross_entropy(pa, y).backward(); F.cross_entropy(pb, y).backward()
        for p,q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p.grad, q.grad)

def test_counts():
    net = resnet18()
    assert sum(p.numel() for p in net.parameters())==sum(p.numel() for p in torch_resnet18(3, 1000, 64).parameters())==11_689_512
    assert len(list(net.parameters()))==62
    assert len(list(simple_cnn().parameters()))==10 and len(list(simple_cnn(norm=True).parameters()))==14
