//! KV for blocks in a device's memory: however small the pieces are in which it comes, it is copied there in large ones.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::ids::Role;
use kv_connector::transfer::{LandingEvent, RefusedExtent};
use support::device::{GATHERED_BYTES, OnDevice};
use support::{Cluster, GRANULE_BYTES, Job, TestMemory, assert_nothing_left};

#[tokio::test]
async fn kv_is_copied_to_a_device_when_enough_has_come() {
    let decode = Cluster::new().start("d0", Role::DecodeNode);
    let zone = decode.landing_zone();
    // A last granule that is not full, and one granule alone.
    for (request, num_tokens) in [(1, 250), (2, 16)] {
        for num_bytes in [1, 7, 1450, GATHERED_BYTES, 5 * GRANULE_BYTES, usize::MAX] {
            let (job, memory) = (Job::new(request, num_tokens, 0, 3), TestMemory::new(64));
            let mut plan = job.plan(&memory);
            plan.memory = OnDevice::new(&memory);
            let (landing, mut events) = zone.open(plan);
            for extent in job.extents(num_tokens) {
                let (header, payload) = job.sealed(extent);
                let before = memory.num_writes.load(Ordering::SeqCst);
                let mut arriving = zone.admit(&header).unwrap();
                payload.chunks(num_bytes.min(payload.len())).for_each(|piece| arriving.write(piece).unwrap());
                arriving.finish().unwrap();
                assert!(matches!(events.try_recv(), Some(LandingEvent::ExtentVerified { .. })));
                assert!(job.holds(&memory, &extent), "{num_bytes} bytes in each piece");
                let num_writes = memory.num_writes.load(Ordering::SeqCst) - before;
                assert!(num_writes <= payload.len().div_ceil(GATHERED_BYTES), "{num_writes} of {num_bytes} bytes each");
            }
            assert!(landing.is_complete());
        }
    }
    drop(zone);
    assert_nothing_left([decode]).await;
}

#[tokio::test]
async fn what_has_come_and_was_not_copied_is_gone_with_the_extent() {
    let decode = Cluster::new().start("d0", Role::DecodeNode);
    let zone = decode.landing_zone();
    let (job, memory) = (Job::new(1, 250, 0, 0), TestMemory::new(64));
    let open = || {
        let mut plan = job.plan(&memory);
        plan.memory = OnDevice::new(&memory);
        zone.open(plan)
    };
    let (header, payload) = job.sealed(job.extent(0, 0, 250));
    let begun = GATHERED_BYTES + 100;
    let untouched = memory.bytes();

    // Given up before there was enough.
    let (landing, _events) = open();
    let mut arriving = zone.admit(&header).unwrap();
    arriving.write(&payload[..100]).unwrap();
    assert_eq!(arriving.finish(), Err(RefusedExtent::Truncated));
    assert!(memory.bytes() == untouched);

    // The same range again, now closed in the middle.
    let mut arriving = zone.admit(&header).unwrap();
    payload[..begun].chunks(100).for_each(|piece| arriving.write(piece).unwrap());
    landing.close();
    let at_close = memory.bytes();
    assert!(at_close != untouched);
    assert_eq!(arriving.write(&payload[begun..]), Err(RefusedExtent::Closed));
    assert_eq!(arriving.finish(), Err(RefusedExtent::Closed));
    assert!(memory.bytes() == at_close, "a byte was written after the close");
    drop((landing, _events));

    // More than was announced; and a byte that is not as it was sent, which is noticed though it was gathered.
    let (_landing, _events) = open();
    let mut arriving = zone.admit(&header).unwrap();
    assert_eq!(arriving.write(&[&payload[..], b"!"].concat()), Err(RefusedExtent::WrongSize));
    arriving.refuse(RefusedExtent::WrongSize);
    let mut arriving = zone.admit(&header).unwrap();
    let mut flipped = payload.to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    flipped.chunks(1450).for_each(|piece| arriving.write(piece).unwrap());
    assert_eq!(arriving.finish(), Err(RefusedExtent::Corrupted));
    drop((_landing, _events, zone));
    assert_nothing_left([decode]).await;
}

#[tokio::test]
async fn a_granule_of_all_layers_is_what_each_layer_has() {
    use common::kv_memory::KvMemory;

    let (job, memory) = (Job::new(1, 64, 0, 3), TestMemory::new(64));
    let memory: Arc<dyn KvMemory> = OnDevice::new(&memory);
    let granule: Vec<u8> = (0..memory.num_layers() * GRANULE_BYTES).map(|at| (at % 253) as u8).collect();
    memory.write_all_layers(&job.blocks, 3, &granule);
    for (layer, bytes) in granule.chunks_exact(GRANULE_BYTES).enumerate() {
        let mut found = vec![0; GRANULE_BYTES];
        memory.read_granules(layer as u32, &job.blocks, 3, 1, &mut found);
        assert_eq!(found, bytes);
    }
    let mut found = vec![0; granule.len()];
    memory.read_all_layers(&job.blocks, 3, &mut found);
    assert_eq!(found, granule);
}
