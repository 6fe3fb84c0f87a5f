//! Launches that are recorded, and graphs of them.
#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::{CudaGraph, CudaStream, result};

use super::Gpu;
use super::refusal::refused;
use crate::cuda::device::{DeviceError, Lane};
use crate::cuda::graph::{Graph, Named};

/// A stream that records and does nothing: the compute lane goes on for the other threads.
pub(super) struct Capture {
    pub(super) stream: Arc<CudaStream>,
    pub(super) named: Named,
    pub(super) num_nodes: usize,
}

/// A graph that is ready to be launched on the compute lane.
pub(super) struct GpuGraph {
    /// Dropped before the device, whose kernels and workspace it uses. If it runs then, the driver lets it end first
    /// (`cuGraphExecDestroy`), and nobody waits.
    pub(super) graph: CudaGraph,
    pub(super) named: Named,
    pub(super) num_nodes: usize,
    pub(super) gpu: Arc<Gpu>,
}

// SAFETY: a graph may be used from any thread as long as one does at a time: that is who holds the compute lane, and
// whoever drops it, which takes exclusive access.
unsafe impl Send for GpuGraph {}
// SAFETY: likewise.
unsafe impl Sync for GpuGraph {}

impl Drop for GpuGraph {
    fn drop(&mut self) {
        // For the fields, which are dropped on this thread. What the driver refuses, it has taken back with the context.
        let _ = self.gpu.bind();
    }
}

impl Graph for GpuGraph {
    fn launch(&self) -> Result<(), DeviceError> {
        self.gpu.bind()?;
        let state = self.gpu.lane(Lane::Compute);
        self.named.check(&self.gpu.allocations())?;
        // SAFETY: instantiated from a capture of this device, whose kernels, workspace and named memory are there;
        // nobody else uses it while the lane is held.
        unsafe { result::graph::launch(self.graph.cu_graph_exec(), state.stream.cu_stream()) }
            .map_err(refused("launch a graph"))
    }

    fn num_nodes(&self) -> usize {
        self.num_nodes
    }
}
