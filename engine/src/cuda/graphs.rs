//! Graphs of decode steps: what lies between the tokens of a step and its logits, recorded once per bucket and
//! launched as a whole from then on.
//!
//! ```text
//! a step       arrays to the device | embed | layers ... logits | sample
//! every time   a copy                 launch  one graph           launches
//! ```
//!
//! What differs from step to step is outside or in memory: which tokens the step before drew (`embed`), what requests
//! ask for (`sample`), and the arrays, which are copied to the same place every time. A bucket's first step is launched
//! directly, so that all memory has its size and the library its plans; its second is recorded. When memory of steps
//! moves, everything recorded is forgotten; the device would refuse it. What is forgotten may still run: the thread
//! that waits drops it, behind the step that forgot it.

use kernels::cuda::{DeviceError, Graph};

use super::step::{Bucket, StepArrays};

/// Graphs that are kept: 20 numbers of rows, each with some numbers of units. A graph takes some 100 KB on a device for
/// every 100 of its launches.
const GRAPHS_MAX: usize = 64;

/// How decode steps went to the device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GraphCounts {
    /// Launch by launch: the first of their bucket, or all where there are no graphs.
    pub num_direct: u64,
    /// Recorded, then launched.
    pub num_recorded: u64,
    /// Launched from what was recorded before.
    pub num_replayed: u64,
}

/// What was met, the latest last.
#[derive(Default)]
pub(super) struct DecodeGraphs {
    /// Whether every step is launched directly.
    is_eager: bool,
    met: Vec<Met>,
    counts: GraphCounts,
    /// Forgotten, and maybe still to run.
    retired: Vec<Box<dyn Graph>>,
}

/// A bucket that had a step, and its graph from the second step on.
struct Met {
    bucket: Bucket,
    arrays: StepArrays,
    /// Moves of memory when it was met.
    num_moves: u64,
    graph: Option<Box<dyn Graph>>,
}

/// How a step's middle part comes to the device.
pub(super) enum Way<'a> {
    /// By launching it.
    Direct,
    /// By recording it, and then launching the graph.
    Record,
    /// By this.
    Replay(&'a dyn Graph),
}

impl DecodeGraphs {
    /// None yet; and none ever where `is_eager`.
    pub(super) fn new(is_eager: bool) -> Self {
        Self { is_eager, ..Self::default() }
    }

    pub(super) fn counts(&self) -> GraphCounts {
        self.counts
    }

    /// For a step whose arrays lie like this, when memory has moved so often.
    pub(super) fn way(&mut self, bucket: Bucket, arrays: &StepArrays, num_moves: u64) -> Way<'_> {
        let stale = self.met.extract_if(.., |met| met.num_moves != num_moves);
        self.retired.extend(stale.filter_map(|met| met.graph));
        let met = self.met.iter().position(|met| met.bucket == bucket && met.arrays.is_laid_out_as(arrays));
        let Some(index) = met else {
            self.counts.num_direct += 1;
            return Way::Direct;
        };
        let met = self.met.remove(index);
        self.met.push(met);
        let met = self.met.last().expect("just pushed");
        match &met.graph {
            Some(graph) => {
                self.counts.num_replayed += 1;
                Way::Replay(graph.as_ref())
            }
            None => {
                self.counts.num_recorded += 1;
                Way::Record
            }
        }
    }

    /// A step of this bucket was launched directly; memory has moved so often behind it.
    pub(super) fn on_direct(&mut self, bucket: Bucket, arrays: StepArrays, num_moves: u64) {
        if self.is_eager {
            return;
        }
        if self.met.len() == GRAPHS_MAX {
            self.retired.extend(self.met.remove(0).graph);
        }
        self.met.push(Met { bucket, arrays, num_moves, graph: None });
    }

    /// Graphs that were forgotten since the last call: to be dropped when everything launched so far is over.
    pub(super) fn take_retired(&mut self) -> Vec<Box<dyn Graph>> {
        std::mem::take(&mut self.retired)
    }

    /// Keeps what was recorded for the step that was last asked about, and launches it.
    ///
    /// # Errors
    /// What the device says.
    pub(super) fn on_recorded(&mut self, graph: Box<dyn Graph>) -> Result<(), DeviceError> {
        let met = self.met.last_mut().expect("a step is recorded when its bucket was met");
        tracing::debug!(bucket = ?met.bucket, num_nodes = graph.num_nodes(), "recorded a graph of decode steps");
        met.graph.insert(graph).launch()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Counts its launches, and that it is there.
    struct Counted(Arc<AtomicUsize>);

    impl Graph for Counted {
        fn launch(&self) -> Result<(), DeviceError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }

        fn num_nodes(&self) -> usize {
            1
        }
    }

    /// Two steps of a bucket, of which the second is recorded.
    fn record(graphs: &mut DecodeGraphs, num_rows: usize, launched: &Arc<AtomicUsize>) {
        let (bucket, arrays) = (Bucket { num_rows, num_units: 1 }, StepArrays::default());
        assert!(matches!(graphs.way(bucket, &arrays, 0), Way::Direct), "{num_rows}");
        graphs.on_direct(bucket, arrays.clone(), 0);
        assert!(matches!(graphs.way(bucket, &arrays, 0), Way::Record), "{num_rows}");
        graphs.on_recorded(Box::new(Counted(launched.clone()))).unwrap();
    }

    #[test]
    fn of_more_buckets_than_are_kept_the_one_used_longest_ago_is_retired() {
        let (mut graphs, launched) = (DecodeGraphs::default(), Arc::new(AtomicUsize::new(0)));
        (0..GRAPHS_MAX).for_each(|number| record(&mut graphs, number, &launched));
        let replay = |graphs: &mut DecodeGraphs, num_rows, num_moves| {
            let bucket = Bucket { num_rows, num_units: 1 };
            matches!(graphs.way(bucket, &StepArrays::default(), num_moves), Way::Replay(_))
        };
        // The first is used again, so the second is the oldest.
        assert!(replay(&mut graphs, 0, 0) && graphs.take_retired().is_empty());
        record(&mut graphs, GRAPHS_MAX, &launched);
        let retired = graphs.take_retired();
        assert_eq!(
            (retired.len(), Arc::strong_count(&launched)),
            (1, GRAPHS_MAX + 2),
            "kept until whoever took it drops it"
        );
        drop(retired);
        assert_eq!((graphs.met.len(), Arc::strong_count(&launched)), (GRAPHS_MAX, GRAPHS_MAX + 1));
        assert!(replay(&mut graphs, 0, 0) && replay(&mut graphs, 2, 0) && !replay(&mut graphs, 1, 0));
        assert_eq!(launched.load(Ordering::Relaxed), GRAPHS_MAX + 1, "each when it was recorded");
        // Memory moves: all of them.
        assert!(!replay(&mut graphs, 0, 1));
        assert_eq!(graphs.take_retired().len(), GRAPHS_MAX);
    }
}
