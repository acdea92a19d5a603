//! The threads of one device: splits an instruction into independent tasks.
//!
//! In: a number of tasks and a function of the task's index. Out: every task has run exactly once.
//! Invariant: [`WorkerPool::run`] returns only when no worker can still touch what the function borrows.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::error::{Error, Result};

/// How often a worker looks for new work before it parks: a few microseconds, so that waiting stays cheap.
const SPINS: u32 = 400;

/// A small persistent pool; the caller of [`WorkerPool::run`] is one of its threads.
pub struct WorkerPool {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    /// Held while a job runs; a nested or concurrent `run` sees it taken and works alone.
    submission: Mutex<()>,
}

struct Shared {
    state: Mutex<State>,
    /// Signaled when a job is posted or the pool ends.
    posted: Condvar,
    /// Signaled when the last worker leaves a job.
    left: Condvar,
    /// Number of jobs posted so far, readable without the lock while spinning.
    generation: AtomicU64,
    next_task: AtomicUsize,
}

#[derive(Default)]
struct State {
    job: Option<Job>,
    n_inside: usize,
    panicked: bool,
    ended: bool,
}

#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    n_tasks: usize,
}

// SAFETY: the pointer is dereferenced only between a job's posting and its withdrawal, during which
// `run` keeps the borrow alive; the pointee is `Sync`.
unsafe impl Send for Job {}

impl WorkerPool {
    /// A pool of `n_threads` threads in all, the caller's included; 0 counts as 1.
    ///
    /// # Errors
    /// `Exhausted` when the system starts no further thread.
    pub fn new(n_threads: usize) -> Result<WorkerPool> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State::default()),
            posted: Condvar::new(),
            left: Condvar::new(),
            generation: AtomicU64::new(0),
            next_task: AtomicUsize::new(0),
        });
        let mut pool = WorkerPool {
            shared,
            handles: Vec::new(),
            submission: Mutex::new(()),
        };
        for worker_idx in 1..n_threads {
            let shared = Arc::clone(&pool.shared);
            let handle = std::thread::Builder::new()
                .name(format!("worker{worker_idx}"))
                .spawn(move || shared.work())
                .map_err(|e| {
                    Error::Exhausted(format!(
                        "cannot start thread {worker_idx} of {n_threads} of a device: {e}; use fewer threads"
                    ))
                })?;
            pool.handles.push(handle);
        }
        Ok(pool)
    }

    /// Number of threads, the caller's included.
    pub fn n_threads(&self) -> usize {
        self.handles.len() + 1
    }

    /// Calls `task(i)` once for every `i < n_tasks`, in no particular order, on the pool's threads.
    ///
    /// # Errors
    /// `Internal` when a task panicked.
    pub fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        let submission = self.submission.try_lock();
        if n_tasks <= 1 || self.handles.is_empty() || submission.is_err() {
            return match catch_unwind(AssertUnwindSafe(|| (0..n_tasks).for_each(task))) {
                Ok(()) => Ok(()),
                Err(_) => Err(panicked()),
            };
        }
        // SAFETY: only the lifetime is erased. The job is withdrawn and every worker has left it
        // before this function returns, so no worker sees the pointer after the borrow ends.
        let erased: *const (dyn Fn(usize) + Sync) = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync)>(
                task,
            )
        };
        {
            let mut state = self.shared.lock();
            self.shared.next_task.store(0, Ordering::Relaxed);
            state.job = Some(Job {
                task: erased,
                n_tasks,
            });
            self.shared.generation.fetch_add(1, Ordering::Release);
        }
        self.shared.posted.notify_all();
        let own = catch_unwind(AssertUnwindSafe(|| self.shared.drain(n_tasks, task)));
        if own.is_err() {
            // No further task starts.
            self.shared.next_task.store(n_tasks, Ordering::Relaxed);
        }
        let mut state = self.shared.lock();
        state.job = None;
        while state.n_inside > 0 {
            state = self
                .shared
                .left
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let worker_panicked = std::mem::take(&mut state.panicked);
        drop(state);
        drop(submission);
        if own.is_err() || worker_panicked {
            Err(panicked())
        } else {
            Ok(())
        }
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.generation.fetch_add(1, Ordering::Release);
        self.shared.posted.notify_all();
        for handle in self.handles.drain(..) {
            // A worker catches its tasks' panics, so joining cannot fail in a way worth reporting here.
            let _ = handle.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drain(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        loop {
            let task_idx = self.next_task.fetch_add(1, Ordering::Relaxed);
            if task_idx >= n_tasks {
                return;
            }
            task(task_idx);
        }
    }

    fn work(&self) {
        let mut seen = 0;
        loop {
            for _ in 0..SPINS {
                if self.generation.load(Ordering::Acquire) != seen {
                    break;
                }
                std::hint::spin_loop();
            }
            let mut state = self.lock();
            let job = loop {
                if state.ended {
                    return;
                }
                let generation = self.generation.load(Ordering::Acquire);
                if generation != seen {
                    seen = generation;
                    if let Some(job) = state.job {
                        state.n_inside += 1;
                        break job;
                    }
                }
                state = self
                    .posted
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                // SAFETY: `n_inside` was raised under the lock while the job was posted, and `run`
                // waits for it to fall before it returns: the borrow is alive here.
                let task = unsafe { &*job.task };
                self.drain(job.n_tasks, task);
            }));
            let mut state = self.lock();
            if outcome.is_err() {
                state.panicked = true;
                self.next_task.store(job.n_tasks, Ordering::Relaxed);
            }
            state.n_inside -= 1;
            if state.n_inside == 0 {
                self.left.notify_all();
            }
        }
    }
}

fn panicked() -> Error {
    Error::Internal(
        "a task of a device's worker pool panicked; its instruction is incomplete".into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let pool = WorkerPool::new(3).unwrap();
        for n_tasks in [0, 1, 2, 17, 100] {
            for _ in 0..50 {
                let counts: Vec<AtomicUsize> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(n_tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                })
                .unwrap();
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn nested_runs_work_alone() {
        let pool = WorkerPool::new(2).unwrap();
        let total = AtomicUsize::new(0);
        pool.run(4, &|_| {
            pool.run(3, &|_| {
                total.fetch_add(1, Ordering::Relaxed);
            })
            .unwrap();
        })
        .unwrap();
        assert_eq!(total.load(Ordering::Relaxed), 12);
    }

    #[test]
    fn a_panic_is_an_error_and_the_pool_lives_on() {
        let pool = WorkerPool::new(2).unwrap();
        let failed = pool.run(8, &|i| assert!(i != 5, "task 5 fails on purpose"));
        assert!(matches!(failed, Err(Error::Internal(_))), "{failed:?}");
        pool.run(8, &|_| {}).unwrap();
    }
}
