//! From work on streams to commands: who has to wait for whom.
//!
//! In: items of work in an order in which one after the other would be right, each with its stream and
//! the memory that it reads and writes. Out: commands with the least waits that keep the result.
//! Invariant: of two items that touch the same bytes, one of them writing, the later one starts after
//! the earlier one has ended: by its stream's order, or through events.

use crate::device::gpu::{Address, Command, EventIdx, StreamIdx, Work};

/// Bytes from a first address up to a last one, which is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) start: Address,
    pub(crate) end: Address,
}

impl Range {
    pub(crate) fn new(start: Address, n_bytes: usize) -> Self {
        Self {
            start,
            end: start + n_bytes as u64,
        }
    }

    fn meets(self, other: Range) -> bool {
        self.start < other.end && other.start < self.end
    }

    fn covers(self, other: Range) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

/// Work that runs on a stream as one, and what it touches.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) stream: StreamIdx,
    pub(crate) reads: Vec<Range>,
    pub(crate) writes: Vec<Range>,
    pub(crate) work: Vec<Work>,
    /// Rank and instruction that it belongs to; several for a collective.
    pub(crate) owners: Vec<(usize, usize)>,
}

/// Items with their waits.
#[derive(Clone, Debug, Default)]
pub(crate) struct Order {
    items: Vec<Item>,
    /// For each item the items of other streams that have to end first.
    waits: Vec<Vec<usize>>,
    n_streams: usize,
}

/// What the commands of a step are, and where their times are taken.
pub(crate) struct Step {
    pub(crate) commands: Vec<Command>,
    /// Where the step begins and ends.
    pub(crate) bounds: (EventIdx, EventIdx),
    /// Events at the beginning and the end of every item; empty where none are taken.
    pub(crate) times: Vec<(EventIdx, EventIdx)>,
    pub(crate) n_events: usize,
}

/// Whether a step's commands take the time of every item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timing {
    EveryItem,
    StepOnly,
}

/// An access that later items may have to wait for.
struct Touch {
    range: Range,
    is_write: bool,
    item: usize,
}

impl Order {
    /// Finds the waits; every stream is less than `n_streams`. Quadratic in the number of ranges that
    /// are in use at a time.
    pub(crate) fn new(items: Vec<Item>, n_streams: usize) -> Self {
        let mut waits = Vec::with_capacity(items.len());
        let mut touched: Vec<Touch> = Vec::new();
        // Of each stream the last item, counted from 1, that is known to have ended: before the next
        // item of a stream, and at the end of every item.
        let mut known = vec![vec![0; n_streams]; n_streams];
        let mut at_end: Vec<Vec<usize>> = Vec::with_capacity(items.len());
        for (item_idx, item) in items.iter().enumerate() {
            let own = item.stream.0;
            let mut last = vec![None; n_streams];
            for touch in &touched {
                let other = items[touch.item].stream.0;
                let conflict = item.writes.iter().any(|range| range.meets(touch.range))
                    || (touch.is_write && item.reads.iter().any(|range| range.meets(touch.range)));
                if other != own && conflict {
                    last[other] = last[other].max(Some(touch.item));
                }
            }
            let mut needed: Vec<usize> = last.into_iter().flatten().collect();
            // The latest first: what it has waited for itself need not be waited for again.
            needed.sort_unstable_by(|a, b| b.cmp(a));
            needed.retain(|earlier| {
                let stream = items[*earlier].stream.0;
                let is_new = known[own][stream] < earlier + 1;
                if is_new {
                    join(&mut known[own], &at_end[*earlier]);
                }
                is_new
            });
            waits.push(needed);
            known[own][own] = item_idx + 1;
            at_end.push(known[own].clone());
            // Who conflicts with an access that this item's write covers, conflicts with the write.
            touched.retain(|touch| !item.writes.iter().any(|range| range.covers(touch.range)));
            let touches = |ranges: &[Range], is_write| {
                let touch = move |range: &Range| Touch {
                    range: *range,
                    is_write,
                    item: item_idx,
                };
                ranges.iter().map(touch).collect::<Vec<_>>()
            };
            touched.extend(touches(&item.writes, true));
            touched.extend(touches(&item.reads, false));
        }
        Self {
            items,
            waits,
            n_streams,
        }
    }

    pub(crate) fn items(&self) -> &[Item] {
        &self.items
    }

    /// The commands of a step: they begin and end on the first stream.
    pub(crate) fn step(&self, timing: Timing) -> Step {
        let mut n_events = 0;
        let mut event = || {
            n_events += 1;
            EventIdx(n_events - 1)
        };
        let bounds = (event(), event());
        let mut awaited = vec![false; self.items.len()];
        for earlier in self.waits.iter().flatten() {
            awaited[*earlier] = true;
        }
        let times: Vec<(EventIdx, EventIdx)> = match timing {
            Timing::EveryItem => self.items.iter().map(|_| (event(), event())).collect(),
            Timing::StepOnly => Vec::new(),
        };
        let ends: Vec<Option<EventIdx>> = (0..self.items.len())
            .map(|item| match times.get(item) {
                Some((_, end)) => Some(*end),
                None => awaited[item].then(&mut event),
            })
            .collect();
        let first = StreamIdx(0);
        let others = (1..self.n_streams).map(StreamIdx);
        let mut commands = Vec::new();
        let mut add = |stream, work| commands.push(Command { stream, work });
        add(first, Work::Record(bounds.0));
        for stream in others.clone() {
            add(stream, Work::Wait(bounds.0));
        }
        for (item_idx, item) in self.items.iter().enumerate() {
            for event in self.waits[item_idx].iter().filter_map(|idx| ends[*idx]) {
                add(item.stream, Work::Wait(event));
            }
            if let Some((start, _)) = times.get(item_idx) {
                add(item.stream, Work::Record(*start));
            }
            for work in &item.work {
                add(item.stream, work.clone());
            }
            if let Some(end) = ends[item_idx] {
                add(item.stream, Work::Record(end));
            }
        }
        for stream in others {
            let end = event();
            add(stream, Work::Record(end));
            add(first, Work::Wait(end));
        }
        add(first, Work::Record(bounds.1));
        Step {
            commands,
            bounds,
            times,
            n_events,
        }
    }
}

/// Each entry becomes the greater one.
fn join(own: &mut [usize], other: &[usize]) {
    for (own, other) in own.iter_mut().zip(other) {
        *own = (*own).max(*other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(stream: usize, reads: &[(u64, usize)], writes: &[(u64, usize)]) -> Item {
        let ranges =
            |list: &[(u64, usize)]| list.iter().map(|(at, n)| Range::new(*at, *n)).collect();
        Item {
            stream: StreamIdx(stream),
            reads: ranges(reads),
            writes: ranges(writes),
            work: Vec::new(),
            owners: Vec::new(),
        }
    }

    #[test]
    fn only_conflicts_across_streams_wait() {
        let order = Order::new(
            vec![
                item(0, &[], &[(0, 64)]),
                item(0, &[(0, 64)], &[(64, 64)]),
                // Reads what the first wrote; the second, behind it, need not have ended.
                item(1, &[(0, 64)], &[(128, 64)]),
                // Two reads of the same bytes do not conflict.
                item(0, &[(0, 64)], &[(192, 64)]),
                // Reads what the other stream wrote.
                item(0, &[(128, 64)], &[(256, 64)]),
                // Writes what the other stream read, but that is known to have ended.
                item(0, &[], &[(0, 8)]),
            ],
            2,
        );
        let none: Vec<usize> = Vec::new();
        assert_eq!(
            order.waits,
            [
                none.clone(),
                none.clone(),
                vec![0],
                none.clone(),
                vec![2],
                none
            ]
        );
    }

    #[test]
    fn waits_follow_from_waits() {
        let order = Order::new(
            vec![
                item(0, &[], &[(0, 8)]),
                item(1, &[(0, 8)], &[(8, 8)]),
                // Through the second item, the first has ended.
                item(2, &[(0, 8), (8, 8)], &[(16, 8)]),
            ],
            3,
        );
        assert_eq!(order.waits, [vec![], vec![0], vec![1]]);
    }
}
