//! Memory planning: which tensors share storage, and where each storage lies in the arena.
//!
//! Enters: a local graph, its items in execution order and what each reads and writes.
//! Leaves: an offset for every tensor, and the bytes alive at every item.
//! Invariants: two storages overlap only if they are never alive together; sources are alive always;
//! a value written in place is written by the last reader of what it replaces, and no two results of
//! one item share storage.

use std::collections::BTreeMap;

use meshweave_dsl::graph::{Graph, Role, TensorId};

/// Alignment of every storage in bytes: a cache line, and an AVX-512 vector.
const ALIGNMENT: usize = 64;

/// What one item reads, writes and may write in place.
#[derive(Clone, Debug, Default)]
pub struct Access {
    pub reads: Vec<TensorId>,
    pub writes: Vec<TensorId>,
    /// (result, input): the result may be written over the input when nobody reads that later.
    pub in_place: Vec<(TensorId, TensorId)>,
    /// Result that is the memory of the input.
    pub view: Option<(TensorId, TensorId)>,
    /// Bytes of scratch that live during this item only.
    pub scratch_bytes: usize,
}

/// Offsets in bytes from the start of the arena.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    pub arena_bytes: usize,
    /// Offset of every tensor that is stored.
    pub offsets: BTreeMap<TensorId, usize>,
    /// Offset of each item's scratch, where it has one.
    pub scratch: Vec<Option<usize>>,
    /// Bytes alive while each item runs.
    pub live_bytes: Vec<usize>,
    /// Updates whose value lies elsewhere at the end and must be copied: (source, value).
    pub copies: Vec<(TensorId, TensorId)>,
}

#[derive(Clone, Debug)]
struct Storage {
    n_bytes: usize,
    first: usize,
    last: usize,
}

/// Plans the arena of one rank. Quadratic in the number of storages in the worst case.
pub fn plan_memory(graph: &Graph, accesses: &[Access]) -> MemoryPlan {
    let mut sharing = Sharing::new(graph, accesses);
    sharing.share_in_place(accesses);
    let copies = sharing.share_updates();
    let (storages, storage_of) = sharing.storages();

    let mut persistent_end = 0;
    let mut offsets = vec![0; storages.len()];
    let mut temporary = Vec::new();
    for (storage_idx, storage) in storages.iter().enumerate() {
        if storage.first == 0 && storage.last == usize::MAX {
            offsets[storage_idx] = persistent_end;
            persistent_end += storage.n_bytes;
        } else {
            temporary.push(storage_idx);
        }
    }
    let mut all = storages.clone();
    let mut scratch_idx = vec![None; accesses.len()];
    for (item_idx, access) in accesses.iter().enumerate() {
        if access.scratch_bytes > 0 {
            scratch_idx[item_idx] = Some(all.len());
            temporary.push(all.len());
            all.push(Storage {
                n_bytes: align(access.scratch_bytes),
                first: item_idx,
                last: item_idx,
            });
            offsets.push(0);
        }
    }
    let temporary_end = place(&all, temporary, persistent_end, &mut offsets);
    let live_bytes = (0..accesses.len())
        .map(|item_idx| {
            let alive = all
                .iter()
                .filter(|storage| storage.first <= item_idx && item_idx <= storage.last);
            alive.map(|storage| storage.n_bytes).sum()
        })
        .collect();
    MemoryPlan {
        arena_bytes: temporary_end,
        offsets: storage_of
            .into_iter()
            .map(|(tensor, storage_idx)| (tensor, offsets[storage_idx]))
            .collect(),
        scratch: scratch_idx
            .into_iter()
            .map(|idx| idx.map(|idx| offsets[idx]))
            .collect(),
        live_bytes,
        copies,
    }
}

/// Places storages greatest first at the lowest free offset; returns the end of the highest.
fn place(storages: &[Storage], mut order: Vec<usize>, base: usize, offsets: &mut [usize]) -> usize {
    order.sort_by_key(|idx| {
        (
            std::cmp::Reverse(storages[*idx].n_bytes),
            storages[*idx].first,
            *idx,
        )
    });
    let mut placed: Vec<usize> = Vec::new();
    let mut end = base;
    for idx in order {
        let storage = &storages[idx];
        let mut conflicts: Vec<(usize, usize)> = placed
            .iter()
            .filter(|other| {
                storages[**other].first <= storage.last && storage.first <= storages[**other].last
            })
            .map(|other| (offsets[*other], offsets[*other] + storages[*other].n_bytes))
            .collect();
        conflicts.sort_unstable();
        let mut offset = base;
        for (start, stop) in conflicts {
            if offset + storage.n_bytes <= start {
                break;
            }
            offset = offset.max(stop);
        }
        offsets[idx] = offset;
        end = end.max(offset + storage.n_bytes);
        placed.push(idx);
    }
    end
}

/// Which tensors share storage: classes of a union-find over tensors.
struct Sharing<'a> {
    graph: &'a Graph,
    parent: Vec<u32>,
    /// First write and last access of each class, by its root; `usize::MAX` at the end of the step.
    first: Vec<usize>,
    last: Vec<usize>,
    /// One more than the last item that reads the class; 0 when none does.
    read_end: Vec<usize>,
    stored: Vec<bool>,
}

impl<'a> Sharing<'a> {
    fn new(graph: &'a Graph, accesses: &[Access]) -> Self {
        let n_tensors = graph.tensors.len();
        let mut sharing = Self {
            graph,
            parent: (0..n_tensors as u32).collect(),
            first: vec![usize::MAX; n_tensors],
            last: vec![0; n_tensors],
            read_end: vec![0; n_tensors],
            stored: vec![false; n_tensors],
        };
        for access in accesses {
            if let Some((result, input)) = access.view {
                sharing.join(result, input);
            }
        }
        for (item_idx, access) in accesses.iter().enumerate() {
            for tensor in access.reads.iter().chain(&access.writes) {
                sharing.touch(*tensor, item_idx);
            }
            for tensor in &access.reads {
                let root = sharing.root(*tensor);
                sharing.read_end[root] = sharing.read_end[root].max(item_idx + 1);
            }
        }
        for tensor in graph.tensor_ids() {
            if graph.tensor(tensor).role != Role::Temp {
                sharing.touch(tensor, 0);
                sharing.touch(tensor, usize::MAX);
            }
        }
        for output in graph.outputs.iter().chain(graph.gradients.values()) {
            sharing.touch(*output, usize::MAX);
        }
        sharing
    }

    fn root(&self, tensor: TensorId) -> usize {
        let mut idx = tensor.0;
        while self.parent[idx as usize] != idx {
            idx = self.parent[idx as usize];
        }
        idx as usize
    }

    /// Puts the class of `tensor` into that of `into`.
    fn join(&mut self, tensor: TensorId, into: TensorId) {
        let (from, to) = (self.root(tensor), self.root(into));
        if from == to {
            return;
        }
        self.parent[from] = to as u32;
        self.first[to] = self.first[to].min(self.first[from]);
        self.last[to] = self.last[to].max(self.last[from]);
        self.read_end[to] = self.read_end[to].max(self.read_end[from]);
        self.stored[to] |= self.stored[from];
    }

    fn touch(&mut self, tensor: TensorId, item_idx: usize) {
        let root = self.root(tensor);
        self.first[root] = self.first[root].min(item_idx);
        self.last[root] = self.last[root].max(item_idx);
        self.stored[root] = true;
    }

    fn is_source_class(&self, root: usize) -> bool {
        self.last[root] == usize::MAX && self.first[root] == 0
    }

    /// Lets results be written over inputs that die at their item, and over the sources they update.
    fn share_in_place(&mut self, accesses: &[Access]) {
        for (item_idx, access) in accesses.iter().enumerate() {
            // A source's own update first: anything else would cost a copy at the end of the step.
            let updates = |(result, input): &(TensorId, TensorId)| {
                self.graph.updates.get(input) == Some(result)
            };
            let mut pairs = access.in_place.clone();
            pairs.sort_by_key(|pair| !updates(pair));
            for (result, input) in pairs {
                let (result_root, input_root) = (self.root(result), self.root(input));
                let is_written = access
                    .writes
                    .iter()
                    .any(|other| *other != result && self.root(*other) == input_root);
                if result_root == input_root || is_written || self.first[result_root] < item_idx {
                    continue;
                }
                let updates_input = self.graph.updates.get(&input) == Some(&result);
                let dies_here = self.last[input_root] == item_idx;
                let read_later = self.read_end[input_root] > item_idx + 1;
                let same_size = self.graph.ty(result).n_bytes() == self.graph.ty(input).n_bytes();
                if same_size && (dies_here || (updates_input && !read_later)) {
                    self.join(result, input);
                }
            }
        }
    }

    /// Lets an updated value be written straight into its source where nobody reads the source any
    /// more; returns the updates for which that does not hold.
    fn share_updates(&mut self) -> Vec<(TensorId, TensorId)> {
        let mut copies = Vec::new();
        for (source, value) in &self.graph.updates {
            let (source_root, value_root) = (self.root(*source), self.root(*value));
            if source_root == value_root {
                continue;
            }
            let same_size = self.graph.ty(*source).n_bytes() == self.graph.ty(*value).n_bytes();
            if same_size
                && !self.is_source_class(value_root)
                && self.read_end[source_root] <= self.first[value_root]
            {
                self.join(*value, *source);
            } else {
                self.touch(*value, usize::MAX - 1);
                copies.push((*source, *value));
            }
        }
        copies
    }

    fn storages(&self) -> (Vec<Storage>, BTreeMap<TensorId, usize>) {
        let mut storages: Vec<Storage> = Vec::new();
        let mut by_root: BTreeMap<usize, usize> = BTreeMap::new();
        let mut storage_of = BTreeMap::new();
        for tensor in self.graph.tensor_ids() {
            let root = self.root(tensor);
            if !self.stored[root] {
                continue;
            }
            let storage_idx = *by_root.entry(root).or_insert_with(|| {
                storages.push(Storage {
                    n_bytes: 0,
                    first: self.first[root],
                    last: self.last[root],
                });
                storages.len() - 1
            });
            let n_bytes = align(self.graph.ty(tensor).n_bytes());
            storages[storage_idx].n_bytes = storages[storage_idx].n_bytes.max(n_bytes);
            storage_of.insert(tensor, storage_idx);
        }
        (storages, storage_of)
    }
}

fn align(n_bytes: usize) -> usize {
    n_bytes.max(1).next_multiple_of(ALIGNMENT)
}
