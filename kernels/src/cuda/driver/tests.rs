use super::lane::STAGING_BYTES;
use super::*;
use crate::cuda::device::{Args, Buffer, as_bytes};
use crate::cuda::images::EMBEDDED;
use crate::cuda::ops::{self, Multiply, PrefillKernel};
use crate::cuda::{PeerMemory, Piece};
use crate::kv_layout::KvLayout;

#[test]
fn a_gpu_that_is_not_there_is_a_sentence() {
    let error = Gpu::open(4096, None).err().unwrap().to_string();
    let says = |part: &str| error.contains(part);
    assert!(says("has no NVIDIA driver") || says("cuda:4096 was asked for") || says("cannot be counted"), "{error}");
}

/// What only runs where there is a driver, with the one of the host: in processes of their own, one thread each.
#[cfg(feature = "fibres")]
#[test]
fn tests_that_need_a_gpu_pass_on_the_host_driver() {
    for wishes in ["capability=9.0,seed=1", "capability=8.0,seed=2"] {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["cuda::driver::tests", "--ignored", "--test-threads=1", "--nocapture"])
            .args(["--skip", "opens_what_was_exported"])
            .env("LD_LIBRARY_PATH", crate::cuda::host_driver_folder())
            .env("HOST_CUDA_DRIVER", wishes)
            .output()
            .unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{wishes}: {said}");
        assert!(said.contains(" 11 passed"), "{wishes}: {said}");
        assert!(!said.contains("host driver:"), "{wishes}: {said}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn every_embedded_kernel_loads() {
    let gpu = Gpu::open(0, None).unwrap();
    let is_hopper = gpu.check_hopper_kernels().is_ok();
    assert_eq!(is_hopper, gpu.capability == (9, 0), "{:?}", gpu.check_hopper_kernels());
    let wanted = EMBEDDED.iter().filter(|kernel| is_hopper || !kernel.is_hopper());
    assert_eq!(gpu.num_kernels(), wanted.map(|kernel| kernel.entries.len()).sum::<usize>());
}

#[test]
#[ignore = "needs a GPU"]
fn arguments_of_another_number_or_size_are_refused() {
    let gpu = Gpu::open(0, None).unwrap();
    if gpu.functions["silu_mul_f32"].parameters.is_none() {
        println!("SKIPPED: the driver is older than CUDA 12.4");
        return;
    }
    let two = Args::default().address(0).address(0);
    for args in [two.clone(), two.clone().u64(8), two.u32(8).u32(1)] {
        let launch = Launch { kernel: "silu_mul_f32", grid: [1; 3], threads: 32, shared_bytes: 0, args: &args };
        // SAFETY: it is refused before anything is launched.
        let said = unsafe { gpu.launch(Lane::Compute, &launch) }.unwrap_err().to_string();
        assert!(said.contains("bytes, the kernel has [8, 8, 4]"), "{said}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn copies_of_several_pieces_come_back() {
    let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
    let bytes: Vec<u8> = (0..5 * STAGING_BYTES + 3).map(|i| (i % 251) as u8).collect();
    for lane in [Lane::Compute, Lane::Transfer] {
        let (from, to) = (Buffer::new(&device, bytes.len()).unwrap(), Buffer::new(&device, bytes.len()).unwrap());
        from.write(lane, 0, &bytes).unwrap();
        to.copy_from(lane, 0, &from, 0, bytes.len()).unwrap();
        to.zero(lane, 1, 2).unwrap();
        let mut back = vec![0; bytes.len()];
        to.read(lane, 0, &mut back).unwrap();
        assert!(back[0] == bytes[0] && back[1..3] == [0, 0] && back[3..] == bytes[3..], "{lane:?}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn what_lies_in_many_places_is_copied_in_one_go() {
    let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
    let buffer = Buffer::of(&device, &vec![0xffu8; 4 * STAGING_BYTES]).unwrap();
    // Out of order, of all sizes, none on a border of a stage, one larger than a stage.
    let places: Vec<(usize, usize)> = [(3 * STAGING_BYTES, 1000), (5, 0), (100, STAGING_BYTES + 77), (10, 1), (40, 30)]
        .into_iter()
        .chain((0..40).map(|i| (2 * STAGING_BYTES + (39 - i) * 5000, 4999)))
        .collect();
    let num_bytes = places.iter().map(|(_, num_bytes)| num_bytes).sum();
    for (turn, lane) in [Lane::Compute, Lane::Transfer].into_iter().enumerate() {
        let bytes: Vec<u8> = (0..num_bytes).map(|i| ((i + turn) % 251) as u8).collect();
        buffer.write_places(lane, &places, &bytes).unwrap();
        let mut back = vec![0; num_bytes];
        buffer.read_places(lane, &places, &mut back).unwrap();
        assert!(back == bytes, "{lane:?}");
        let mut all = vec![0; buffer.num_bytes()];
        buffer.read(lane, 0, &mut all).unwrap();
        let mut expected = vec![0xff; all.len()];
        let mut rest = &bytes[..];
        for &(offset, num_bytes) in &places {
            let (now, later) = rest.split_at(num_bytes);
            expected[offset..][..num_bytes].copy_from_slice(now);
            rest = later;
        }
        assert!(all == expected, "{lane:?}: what lies between the places is as it was");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn memory_is_given_back_when_what_was_asked_for_before_is_done() {
    let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
    let kept = Buffer::of(&device, &[1u32, 2]).unwrap();
    let given_back = Buffer::of(&device, &[3u32, 4]).unwrap();
    kept.copy_from(Lane::Compute, 0, &given_back, 0, 8).unwrap();
    drop(given_back);
    let mut bytes = [0; 8];
    kept.read(Lane::Compute, 0, &mut bytes).unwrap();
    assert_eq!(bytes, as_bytes(&[3u32, 4]));
}

#[test]
#[ignore = "needs a GPU"]
fn what_is_read_in_the_order_of_the_lane_lands_by_itself() {
    let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
    let buffer = Buffer::of(&device, &[1u32, 2, 3]).unwrap();
    let before = buffer.start_read(4, 8).unwrap();
    buffer.zero(Lane::Compute, 0, 12).unwrap();
    let behind = buffer.start_read(0, 12).unwrap();
    assert_eq!((before.bytes().unwrap(), behind.bytes().unwrap()), (as_bytes(&[2u32, 3]), &[0; 12][..]));
    // The memory of one that nobody waited for is not given to another before its copy is over.
    (0..100u32).for_each(|_| drop(buffer.start_read(0, 12).unwrap()));
    assert_eq!(behind.bytes().unwrap(), [0; 12]);
}

#[test]
#[ignore = "needs a GPU"]
fn a_graph_does_again_what_was_recorded_with_what_is_there_then() {
    let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
    let table = Buffer::of(&device, &[1f32, 2.0, 3.0, 4.0]).unwrap();
    let (ids, out) = (Buffer::of(&device, &[1u32]).unwrap(), Buffer::of(&device, &[0f32; 2]).unwrap());
    device.begin_capture().unwrap();
    ops::embed(&table, ops::Dtype::F32, ops::Part::from(&ids), None, &out, 1, 2).unwrap();
    let graph = device.clone().end_capture().unwrap();
    for (id, wanted) in [(0u32, [1f32, 2.0]), (1, [3.0, 4.0])] {
        ids.write(Lane::Compute, 0, &id.to_le_bytes()).unwrap();
        graph.launch().unwrap();
        let mut bytes = [0; 8];
        out.read(Lane::Compute, 0, &mut bytes).unwrap();
        assert_eq!(bytes, wanted.map(f32::to_le_bytes).as_flattened());
    }
    drop(ids);
    assert!(graph.launch().unwrap_err().to_string().contains("was given back"));
}

#[test]
#[ignore = "needs a GPU"]
fn launches_that_overlap_see_what_the_one_ahead_wrote() {
    let gpu = Gpu::open(0, None).unwrap();
    let can_overlap = gpu.capability == (9, 0);
    let device: Arc<dyn Device> = Arc::new(gpu);
    assert_eq!(device.enable_pdl().is_ok(), can_overlap, "{:?}", device.enable_pdl());
    let (rows, width) = (64, 4096);
    let table: Vec<f32> = (0..width).map(|i| if i % 2 == 0 { 3.0 } else { -3.0 }).collect();
    let (table, ones) = (Buffer::of(&device, &table).unwrap(), Buffer::of(&device, &vec![1f32; width]).unwrap());
    let ids = Buffer::of(&device, &vec![0u32; rows]).unwrap();
    let (x, out) = (Buffer::new(&device, rows * width * 4).unwrap(), Buffer::new(&device, rows * width * 4).unwrap());
    for _ in 0..20 {
        x.zero(Lane::Compute, 0, x.num_bytes()).unwrap();
        ops::embed(&table, ops::Dtype::F32, ops::Part::from(&ids), None, &x, rows, width).unwrap();
        ops::rms_norm(&x, &ones, 0.0, &out, ops::Dtype::F32, rows, width).unwrap();
    }
    let landing = out.start_read(0, out.num_bytes()).unwrap();
    let signs = landing.bytes().unwrap().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    assert!(signs.enumerate().all(|(i, value)| value == if i % 2 == 0 { 1.0 } else { -1.0 }));
}

/// Values between -1 and 1.
fn random_bf16(device: &Arc<dyn Device>, seed: u64, count: usize) -> Buffer {
    let value = |i: u32| half::bf16::from_f64(2.0 * crate::uniform(seed, 0, i) - 1.0);
    Buffer::of(device, &(0..count as u32).map(value).collect::<Vec<_>>()).unwrap()
}

#[test]
#[ignore = "needs a GPU"]
fn attention_of_prompts_by_warpgroups_is_that_of_the_portable_kernel() {
    let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
    if let Err(reason) = device.check_hopper_kernels() {
        println!("SKIPPED: {reason}");
        return;
    }
    for (head_dim, block_size, window) in [(64, 16, 0), (64, 48, 100), (128, 64, 0), (128, 32, 700)] {
        let (num_heads, num_kv_heads, first_position, num_rows) = (6, 2, 900, 300usize);
        let num_blocks = (first_position + num_rows).div_ceil(block_size);
        let dtype = ops::Dtype::Bf16;
        let layout = KvLayout { num_layers: 2, num_blocks, block_size, num_kv_heads, head_dim, dtype };
        let memory = random_bf16(&device, 1, layout.total_bytes() / 2);
        let pool = ops::Pool { buffer: &memory, layout: &layout };
        let q = random_bf16(&device, 2, num_rows * num_heads * head_dim);
        let tiles = (0..num_rows)
            .step_by(ops::PREFILL_ROWS)
            .map(|first| [first, ops::PREFILL_ROWS.min(num_rows - first), first_position + first, 0].map(|n| n as u32));
        let tiles: Vec<[u32; 4]> = tiles.collect();
        let table: Vec<u32> = (0..num_blocks as u32).rev().collect();
        let (num_tiles, tiles) = (tiles.len(), Buffer::of(&device, tiles.as_flattened()).unwrap());
        let table = Buffer::of(&device, &table).unwrap();
        let shape = ops::AttentionShape { layer: 1, num_heads, scale: 0.1, window, num_rows };
        let attended = |kernel| {
            let out = Buffer::new(&device, q.num_bytes()).unwrap();
            let (tiles, table) = (ops::Part::from(&tiles), ops::Part::from(&table));
            ops::attention_prefill(kernel, pool, &shape, &q, tiles, num_tiles, table, &out).unwrap();
            let mut bytes = vec![0; out.num_bytes()];
            out.read(Lane::Compute, 0, &mut bytes).unwrap();
            bytes.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect::<Vec<f32>>()
        };
        let (found, wanted) = (attended(PrefillKernel::Hopper), attended(PrefillKernel::Portable));
        let same = found.iter().zip(&wanted).filter(|(found, wanted)| found == wanted).count();
        println!("heads of {head_dim}: {same} of {} values are the same", wanted.len());
        for (found, wanted) in found.iter().zip(&wanted) {
            assert!((found - wanted).abs() <= 1e-2 * wanted.abs().max(1.0), "{found} and {wanted}");
        }
    }
}

const HANDLE: &str = "TANDEM_TEST_HANDLE";

fn some_bytes() -> Vec<u8> {
    (0..3 << 20).map(|i: u32| (i % 253) as u8).collect()
}

#[test]
#[ignore = "needs a GPU"]
fn exported_memory_is_copied_by_another_process() {
    let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
    let bytes = some_bytes();
    let buffer = Buffer::shared(&device, bytes.len()).unwrap();
    buffer.write(Lane::Transfer, 0, &bytes).unwrap();
    let handle: String = buffer.export().unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
    let other = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["cuda::driver::tests::opens_what_was_exported", "--exact", "--ignored", "--nocapture"])
        .env(HANDLE, handle)
        .output()
        .unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&other.stdout), String::from_utf8_lossy(&other.stderr));
    // A filter that matches nothing is a success, too.
    assert!(other.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "a part of another test, which runs it in a process of its own"]
fn opens_what_was_exported() {
    let hex = std::env::var(HANDLE).expect("it is run by the other test");
    let handle: Vec<u8> = hex
        .as_bytes()
        .chunks(2)
        .map(|byte| u8::from_str_radix(std::str::from_utf8(byte).unwrap(), 16).unwrap())
        .collect();
    let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
    let bytes = some_bytes();
    let peer = PeerMemory::open(&device, &handle, bytes.len()).unwrap();
    let (own, scratch) = (Buffer::new(&device, bytes.len()).unwrap(), Buffer::new(&device, ops::DIGEST_BYTES).unwrap());
    let half = bytes.len() / 2;
    let pieces = [(half, 0), (0, half)].map(|(from, to)| Piece { from, to, num_bytes: half });
    peer.copy_to(&own, &pieces).unwrap();
    let mut back = vec![0; bytes.len()];
    own.read(Lane::Transfer, 0, &mut back).unwrap();
    assert!(back == [&bytes[half..], &bytes[..half]].concat());
    let digest = |pieces: &[(usize, usize)]| ops::digest(&own, pieces, &scratch).unwrap();
    assert_eq!(digest(&[(0, half), (half, half)]), digest(&[(0, bytes.len())]));
}

#[test]
#[ignore = "needs a GPU and cuBLASLt"]
fn a_product_of_the_library_is_that_of_the_kernel() {
    let device: Arc<dyn Device> = Arc::new(Gpu::open(0, None).unwrap());
    assert!(device.has_product(), "libcublasLt is not found: name its folder in LD_LIBRARY_PATH");
    let (m, n, k) = (40, 48, 64);
    let values = |seed, count: usize| (0..count as u32).map(move |i| crate::uniform(seed, 0, i) as f32 - 0.5);
    let bf16 =
        |seed, count| Buffer::of(&device, &values(seed, count).map(half::bf16::from_f32).collect::<Vec<_>>()).unwrap();
    let (x, w) = (bf16(1, m * k), bf16(2, n * k));
    let bias = Buffer::of(&device, &values(3, n).collect::<Vec<_>>()).unwrap();
    for (bias, add) in [(None, false), (Some(&bias), false), (None, true), (Some(&bias), true)] {
        let product = |multiply: fn(&Multiply<'_>) -> Result<(), DeviceError>| {
            let out = Buffer::of(&device, &values(4, m * n).collect::<Vec<_>>()).unwrap();
            multiply(&Multiply { x: &x, w: &w, bias, out: &out, m, n, k, add }).unwrap();
            let mut bytes = vec![0; m * n * 4];
            out.read(Lane::Compute, 0, &mut bytes).unwrap();
            bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<f32>>()
        };
        let (library, kernel) = (product(ops::library_matmul), product(ops::skinny_matmul));
        for (library, kernel) in library.iter().zip(&kernel) {
            assert!((library - kernel).abs() < 1e-4, "{library} and {kernel}, add {add}");
        }
    }
}
