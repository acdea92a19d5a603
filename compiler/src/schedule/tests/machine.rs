//! A machine that runs lowered schedules under the channel models, independent of the checks.
//!
//! It moves whatever can move, in a random order, until nothing can: done, or deadlocked.

use std::collections::{BTreeMap, VecDeque};

use meshweave_dsl::schedule::{Channels, Command, DeviceStreams, Lowered, StreamKind, Verb, Wire};

/// What travels: stage of the sender, direction, microbatch, slice.
type Tag = (u32, Wire, u32, u32);

fn tag(lowered: &Lowered, command: Command) -> Tag {
    let schedule = &lowered.schedule;
    let microbatch = command.microbatch.unwrap();
    match command.verb {
        Verb::Send(wire) => (command.stage, wire, microbatch, command.slice),
        Verb::Recv(Wire::F) => (
            schedule.stage_before(command.stage).unwrap(),
            Wire::F,
            microbatch,
            command.slice,
        ),
        _ => (
            schedule.stage_after(command.stage).unwrap(),
            Wire::B,
            microbatch,
            command.slice,
        ),
    }
}

/// Runs all streams; whether every item ran. Messages must match in order of their queues: a wrong
/// head blocks, as it does on hardware. `seed` orders what is tried.
pub(super) fn finishes(lowered: &Lowered, devices: &[DeviceStreams], seed: u64) -> bool {
    if lowered.channels == Channels::Blocking {
        return finishes_in_row_order(lowered, devices);
    }
    let depth = match lowered.channels {
        Channels::Buffered(depth) => Some(depth.max(1)),
        _ => None,
    };
    let mut heads: Vec<Vec<usize>> = devices.iter().map(|d| vec![0; d.streams.len()]).collect();
    let mut is_recorded: Vec<Vec<bool>> = lowered
        .rows
        .iter()
        .map(|row| vec![false; row.len()])
        .collect();
    let mut buffers: BTreeMap<(usize, usize), VecDeque<Tag>> = BTreeMap::new();
    let mut order: Vec<(usize, usize)> = devices
        .iter()
        .flat_map(|device| (0..device.streams.len()).map(move |stream| (device.rank, stream)))
        .collect();
    let mut state = seed;
    loop {
        let mut has_moved = false;
        for nth in (1..order.len()).rev() {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            order.swap(nth, (state >> 33) as usize % (nth + 1));
        }
        for (rank, stream) in order.clone() {
            let Some(item) = devices[rank].streams[stream].items.get(heads[rank][stream]) else {
                continue;
            };
            if item.waits.iter().any(|event| !is_recorded[rank][event.0]) {
                continue;
            }
            let runs = match item.command.verb {
                Verb::Send(_) => {
                    let to = lowered.peer(item.command).unwrap();
                    let tag = tag(lowered, item.command);
                    match depth {
                        Some(depth) => {
                            let buffer = buffers.entry((rank, to)).or_default();
                            let has_room = buffer.len() < depth;
                            if has_room {
                                buffer.push_back(tag);
                            }
                            has_room
                        }
                        None => {
                            // The receiver's queue with us must have the matching receive at its head.
                            let streams = &devices[to].streams;
                            let at = streams.iter().position(|other| {
                                other.kind == StreamKind::Recv { from: rank }
                                    || other.kind == StreamKind::Exchange { with: Some(rank) }
                            });
                            let other = at.unwrap();
                            let head = streams[other].items.get(heads[to][other]);
                            let matches = head.is_some_and(|head| {
                                matches!(head.command.verb, Verb::Recv(_))
                                    && self::tag(lowered, head.command) == tag
                            });
                            if matches {
                                let head = head.unwrap();
                                is_recorded[to][head.event.0] = true;
                                heads[to][other] += 1;
                            }
                            matches
                        }
                    }
                }
                Verb::Recv(_) => match depth {
                    Some(_) => {
                        let from = lowered.peer(item.command).unwrap();
                        let buffer = buffers.entry((from, rank)).or_default();
                        let is_here = buffer.front() == Some(&tag(lowered, item.command));
                        if is_here {
                            buffer.pop_front();
                        }
                        is_here
                    }
                    // The sender moves both.
                    None => false,
                },
                _ => true,
            };
            if runs {
                is_recorded[rank][item.event.0] = true;
                heads[rank][stream] += 1;
                has_moved = true;
            }
        }
        if !has_moved {
            return is_recorded.iter().flatten().all(|is_recorded| *is_recorded);
        }
    }
}

/// One thing at a time on each rank; a send and its receive go together.
fn finishes_in_row_order(lowered: &Lowered, devices: &[DeviceStreams]) -> bool {
    let rows = &lowered.rows;
    let mut next = vec![0; rows.len()];
    // A command whose operand comes later in its own row can never run.
    let items = devices
        .iter()
        .flat_map(|device| device.streams.iter().flat_map(|s| &s.items));
    if items
        .into_iter()
        .any(|item| item.waits.iter().any(|needed| *needed > item.event))
    {
        return false;
    }
    loop {
        let mut has_moved = false;
        for rank in 0..rows.len() {
            while let Some(command) = rows[rank].get(next[rank]) {
                match command.verb {
                    Verb::Recv(_) => break,
                    Verb::Send(_) => {
                        let to = lowered.peer(*command).unwrap();
                        let head = rows[to].get(next[to]);
                        let matches = head.is_some_and(|head| {
                            matches!(head.verb, Verb::Recv(_))
                                && tag(lowered, *head) == tag(lowered, *command)
                        });
                        if !matches {
                            break;
                        }
                        next[to] += 1;
                    }
                    _ => {}
                }
                next[rank] += 1;
                has_moved = true;
            }
        }
        if !has_moved {
            return rows.iter().zip(&next).all(|(row, next)| *next == row.len());
        }
    }
}
