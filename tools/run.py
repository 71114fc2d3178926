"""Run the chapters from top to bottom, each in a fresh kernel, two at a time.

    python tools/run.py                 run all; executed copies go to _run/; ends with the ladder of results
    python tools/run.py 02 05           only the chapters whose names start so
    python tools/run.py --save [02 …]   for authors: export the library first, then save the outputs in nbs/ and
                                        the README made from nbs/index.ipynb

It needs nbclient and no nbdev, so that it also runs where nbdev's pinned versions do not (`--save` does need it)."""
import argparse, json, os, re, shutil, subprocess, sys, tempfile, threading, time, tomllib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import nbformat, psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
NBS, OUT = ROOT/'nbs', ROOT/'_run'
CELL_TIMEOUT = 600  # seconds
KERNEL_ENV = {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1',         # two notebooks with two threads each would fight over two cores
              'MPLBACKEND': 'module://matplotlib_inline.backend_inline'}     # with the caller's, figures might not be kept

def memory(p):
    "Bytes that process `p` takes; on Linux, memory that several processes share is divided among them"
    m = p.memory_full_info() if sys.platform=='linux' else p.memory_info()
    return getattr(m, 'pss', m.rss)

class Chapter:
    "One notebook and what running it gave: `seconds`, `peak` (MiB, with its worker processes) and `results`"
    def __init__(self, path, stop):
        self.path, self.stop, self.name = path, stop, path.stem
        self.nb = nbformat.read(path, as_version=4)
        self.seconds, self.peak, self.results, self.error, self.cell = 0., 0, {}, None, 0

    def run(self):
        "Execute every cell; an error is kept in `error`, not raised"
        results = Path(tempfile.mkdtemp(prefix='course_'))/'results.jsonl'
        client = NotebookClient(self.nb, timeout=CELL_TIMEOUT, kernel_name='python3', coalesce_streams=True,
                                resources={'metadata': {'path': str(NBS)}}, extra_arguments=['--log-level=40'])  # errors only
        client.create_kernel_manager()
        done = threading.Event()
        start = time.time()
        try:
            with client.setup_kernel(env={**os.environ, **KERNEL_ENV, 'COURSE_RESULTS': str(results)}):
                threading.Thread(target=self._watch, args=(client.km, done), daemon=True).start()
                for i,cell in enumerate(self.nb.cells):
                    if self.stop.is_set(): break
                    self.cell = i
                    if cell.cell_type != 'code': continue
                    if re.search(r'^#\|\s*eval:\s*false', cell.source, re.M): cell.outputs = []
                    else: client.execute_cell(cell, i)
        except (CellExecutionError, DeadKernelError, TimeoutError) as e:
            if not self.stop.is_set():
                self.error = f'{e.ename}: {e.evalue}' if isinstance(e, CellExecutionError) else f'{type(e).__name__}: {e}'
                self.stop.set()
        finally: done.set()
        self.seconds = time.time() - start
        if results.exists():
            rows = [json.loads(o) for o in results.read_text(encoding='utf-8').splitlines()]
            self.results = {o['key']: {**o, 'seconds': o['time'] - start} for o in rows}
        shutil.rmtree(results.parent)
        return self

    def _watch(self, km, done):
        "Remember the most memory that the kernel and its children held at once; end them if another chapter failed"
        while True:
            with suppress(psutil.Error):    # a process may end between being listed and being read
                kernel = psutil.Process(km.provisioner.pid)
                processes = [*kernel.children(recursive=True), kernel]
                self.peak = max(self.peak, sum(map(memory, processes)) >> 20)
                if self.stop.is_set():
                    for p in processes: p.kill()
            if done.wait(0.5): return

    def explain(self):
        "Name the notebook, the cell and the error of a failed run"
        source = self.nb.cells[self.cell].source.strip()
        shown = '\n'.join('    ' + o for o in source.splitlines()[:12])
        return f'\n{self.path.relative_to(ROOT).as_posix()}, cell {self.cell+1}, failed:\n\n{shown}\n\n{self.error}\n'

def select(names):
    "Paths of the notebooks whose names start with one of `names`; all where it is empty"
    all_nbs = sorted(NBS.glob('*.ipynb'))
    if not names: return all_nbs
    found = {n: [p for p in all_nbs if p.name.startswith(Path(n).name.removesuffix('.ipynb') or ' ')] for n in names}
    unknown = [n for n,paths in found.items() if not paths]
    if unknown: sys.exit(f"no notebook's name starts with {' or '.join(map(repr, unknown))}; there are: {', '.join(p.stem for p in all_nbs)}")
    return sorted({p for paths in found.values() for p in paths})

def measured(path):
    "Seconds that a chapter took when it was last saved, as its first cell says; 0 if it does not say"
    line = re.search(r'\*Two cores: (\d+) s', path.read_text(encoding='utf-8'))
    return int(line[1]) if line else 0

def run_all(paths, workers=2):
    "Run the notebooks, `workers` at a time and the longest first, so that they end together; stops at a failing cell"
    stop, chapters = threading.Event(), []
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(paths), unit='notebook', disable=None) as bar:
        todo = {pool.submit(Chapter(p, stop).run) for p in sorted(paths, key=measured, reverse=True)}
        try:
            while todo:
                ended,todo = wait(todo, return_when=FIRST_COMPLETED)
                for c in [o.result() for o in ended]:
                    if c.error: sys.exit(c.explain())
                    chapters.append(c)
                    bar.update()
                    bar.write(f'{c.name:16} {c.seconds:6.1f} s {c.peak:6,} MiB')
        finally:  # a failure or Ctrl-C: begin no other notebook, and end the one that runs
            stop.set()
            for t in todo: t.cancel()
            bar.close()
    return sorted(chapters, key=lambda c: c.name)

def print_ladder(chapters):
    "Print one row per rung of the ladder (listed in the ledger) that was run"
    results = {k:v for c in chapters for k,v in c.results.items()}
    rows = [('model', 'task', 'parameters', 'valid accuracy', 'expected', 'chapter', 'seconds')]
    for r in tomllib.loads((NBS/'ledger.toml').read_text(encoding='utf-8'))['ladder']:
        if not {r['accuracy'], r['params']} <= set(results): continue     # its chapter was not run
        acc,params = results[r['accuracy']],results[r['params']]
        rows.append((r['model'], r['task'], f"{params['value']:,}", f"{acc['value']:.4f}", acc['expected'],
                     r['accuracy'].partition('.')[0], f"{acc['seconds']:.1f}"))
    if len(rows)==1: return     # none of these chapters has a rung
    widths = [max(map(len, col)) for col in zip(*rows)]
    print('\nThe ladder (seconds: from the start of the chapter to the result)\n')
    for row in rows: print('  '.join(o.ljust(w) for o,w in zip(row, widths)).rstrip())

def stamp(c):
    "Put the time and memory that a chapter took into its first cell, unless what stands there is still about right"
    import torch
    line = f'*Two cores: {max(1, round(c.seconds))} s, {round(c.peak, -1)} MB. Last run: torch {torch.__version__.split("+")[0]}.*'
    pattern = r'\*Two cores: (\d+) s, (\d+) MB\. Last run: torch [\d.]+\.\*'
    for cell in c.nb.cells:
        old = re.search(pattern, cell.source)
        if not old: continue
        near = all(0.6 < float(o)/max(new, 1) < 1.6 for o,new in zip(old.groups(), (c.seconds, c.peak)))
        if not near or line.split('.')[-3:] != old[0].split('.')[-3:]: cell.source = cell.source.replace(old[0], line)

def nbdev(command, *args):
    "Run one of nbdev's commands"
    subprocess.run([str(Path(sys.executable).parent/f'nbdev_{command}'), *args], cwd=ROOT, check=True)

def save(chapters):
    "Write the outputs into nbs/, cleaned, and the README from the index"
    for c in chapters:
        stamp(c)
        c.nb.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
        nbformat.write(c.nb, c.path)
        nbdev('clean', '--fname', str(c.path))
        if c.name=='index': (ROOT/'README.md').write_text(readme(c.nb), encoding='utf-8')

def readme(nb):
    "The README: the index's prose and what its cells show, without the code"
    parts = []
    for cell in nb.cells:
        if cell.cell_type == 'markdown': parts.append(cell.source)
        for o in cell.get('outputs', []):
            if 'text/markdown' in o.get('data', {}): parts.append(o['data']['text/markdown'])
    text = '\n\n'.join(o.strip() for o in parts)
    text = re.sub(r'\]\((?=\w+\.(ipynb|toml)\))', '](nbs/', text)     # links start from the repository's root there
    return f'<!-- Made from nbs/index.ipynb by `make save`: change that. -->\n\n{text}\n'

def main():
    p = argparse.ArgumentParser(description='Run the chapters from top to bottom, each in a fresh kernel.')
    p.add_argument('names', nargs='*', help='first letters of the notebooks to run, such as 02 05; all if none')
    p.add_argument('--save', action='store_true', help='save the outputs in nbs/ and make the README')
    args = p.parse_args()
    paths = select(args.names)
    if args.save:
        if not shutil.which('dot'): sys.exit("saving needs Graphviz's `dot`, or readers would get diagrams as text: install graphviz")
        nbdev('export')
    start = time.time()
    chapters = run_all(paths)
    if args.save: save(chapters)
    else:
        OUT.mkdir(exist_ok=True)
        for c in chapters: nbformat.write(c.nb, OUT/c.path.name)
    print_ladder(chapters)
    print(f'\nnotebooks run: {len(chapters)}, in {time.time()-start:.0f} s')

if __name__ == '__main__':
    for stream in (sys.stdout, sys.stderr):     # what a terminal or file cannot take, such as é where it is ASCII, becomes a question mark
        if hasattr(stream, 'reconfigure'): stream.reconfigure(errors='replace')
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:     # whoever reads the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or Python would complain once more at its end
        sys.exit(1)
