//! A sender's pool in a file in memory, which receivers on the same host can be let read.
#![allow(dead_code, unreachable_pub, unsafe_code, clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use common::ids::BlockId;
use common::kv_memory::KvMemory;
use kv_connector::transfer::{ExtentRequest, ExtentSource, SharedPool};

use super::{GRANULE_BYTES, GRANULES_PER_BLOCK, Job, NUM_LAYERS, kv_spec};

/// Written with file calls, so it is sealed against another size only. Mapped, to be shown in place.
pub struct FilePool {
    file: File,
    mapped: *const u8,
    num_blocks: usize,
}

// SAFETY: plain memory without thread affinity; the tests write to the file only while nobody reads.
unsafe impl Send for FilePool {}
// SAFETY: as above.
unsafe impl Sync for FilePool {}

impl Drop for FilePool {
    fn drop(&mut self) {
        // SAFETY: mapped in `sealed` with this size, and nothing refers to it any more.
        unsafe { libc::munmap(self.mapped.cast_mut().cast(), self.num_bytes() as usize) };
    }
}

impl FilePool {
    pub fn new(num_blocks: usize) -> Arc<Self> {
        Self::sealed(num_blocks, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)
    }

    pub fn sealed(num_blocks: usize, seals: i32) -> Arc<Self> {
        // SAFETY: the name is a C string that outlives the call; the descriptor is made here and owned by the file.
        let file = unsafe {
            let fd = libc::memfd_create(c"test-pool".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            File::from_raw_fd(fd)
        };
        let num_bytes = (NUM_LAYERS * num_blocks * GRANULES_PER_BLOCK * GRANULE_BYTES) as u64;
        file.set_len(num_bytes).unwrap();
        let (len, fd) = (num_bytes as usize, file.as_raw_fd());
        // SAFETY: a fresh mapping at an address of the kernel's choice, of a file of this size.
        let mapped = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, fd, 0) };
        assert!(mapped != libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        let pool = Self { file, mapped: mapped.cast(), num_blocks };
        // SAFETY: an integer call on a descriptor that is open.
        assert_eq!(unsafe { libc::fcntl(pool.file.as_raw_fd(), libc::F_ADD_SEALS, seals) }, 0);
        Arc::new(pool)
    }

    pub fn num_bytes(&self) -> u64 {
        (NUM_LAYERS * self.num_blocks * GRANULES_PER_BLOCK * GRANULE_BYTES) as u64
    }

    pub fn shared(self: &Arc<Self>) -> SharedPool {
        let file = Arc::new(self.file.try_clone().unwrap().into());
        SharedPool { memory: self.clone(), file, num_bytes: self.num_bytes() }
    }

    /// Sends the file over a UNIX socket, as a node does.
    pub fn send_over(&self, socket: &impl AsRawFd) {
        let mut byte = 0u8;
        let mut iov = libc::iovec { iov_base: std::ptr::from_mut(&mut byte).cast(), iov_len: 1 };
        // More than the one descriptor takes, aligned as a control message must be.
        let mut control = [0u64; 8];
        // SAFETY: all zeros is a valid `msghdr`; the control buffer is aligned for, and has room for, one header and one
        // descriptor; both buffers outlive the call.
        let sent = unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = &mut iov;
            message.msg_iovlen = 1;
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(size_of::<i32>() as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<i32>() as u32) as _;
            libc::CMSG_DATA(header).cast::<i32>().write_unaligned(self.file.as_raw_fd());
            libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL)
        };
        assert_eq!(sent, 1, "{}", std::io::Error::last_os_error());
    }

    /// Puts a job's KV into these blocks, and makes what sends it from there.
    pub fn source(self: &Arc<Self>, job: &Job, blocks: Vec<BlockId>) -> ExtentSource {
        for layer in 0..NUM_LAYERS as u16 {
            let whole = job.payload(&job.extent(layer, 0, job.tokens.len()));
            for (granule, bytes) in whole.chunks(GRANULE_BYTES).enumerate() {
                self.file.write_all_at(bytes, self.offset(u32::from(layer), &blocks, granule)).unwrap();
            }
        }
        let Job { epoch, request, attempt, generation, .. } = *job;
        ExtentSource {
            memory: self.clone(),
            kv_spec: kv_spec(),
            blocks: blocks.into(),
            chain: job.chain(),
            request: ExtentRequest { epoch, request, attempt, generation },
        }
    }

    /// Flips a bit of a granule.
    pub fn damage(&self, layer: u32, blocks: &[BlockId], granule: usize) {
        let mut byte = [0];
        let at = self.offset(layer, blocks, granule) + 77;
        self.file.read_exact_at(&mut byte, at).unwrap();
        self.file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    }

    fn offset(&self, layer: u32, blocks: &[BlockId], granule: usize) -> u64 {
        let block = layer as usize * self.num_blocks + blocks[granule / GRANULES_PER_BLOCK].0 as usize;
        ((block * GRANULES_PER_BLOCK + granule % GRANULES_PER_BLOCK) * GRANULE_BYTES) as u64
    }
}

/// Blocks in an order in which some are neighbours and most are not.
pub fn scattered(first: u32, num_blocks: usize) -> Vec<BlockId> {
    let mut blocks: Vec<BlockId> = (0..num_blocks as u32).map(|block| BlockId(first + block)).collect();
    let half = blocks.len() / 2;
    blocks[half..].reverse();
    blocks.rotate_left(half);
    blocks
}

impl KvMemory for FilePool {
    fn write_at(&self, _: u32, _: &[BlockId], _: usize, _: usize, _: &[u8]) {
        unreachable!("nothing lands at a sender");
    }

    fn read_granules(&self, layer: u32, blocks: &[BlockId], first_granule: usize, num_granules: usize, out: &mut [u8]) {
        let mut done = 0;
        self.visit_granules(layer, blocks, first_granule, num_granules, &mut |_, bytes| {
            out[done..][..bytes.len()].copy_from_slice(bytes);
            done += bytes.len();
        });
    }

    fn visit_granules(
        &self,
        layer: u32,
        blocks: &[BlockId],
        first_granule: usize,
        num_granules: usize,
        visit: &mut dyn FnMut(u64, &[u8]),
    ) {
        for granule in first_granule..first_granule + num_granules {
            let mut bytes = vec![0; GRANULE_BYTES];
            let offset = self.offset(layer, blocks, granule);
            self.file.read_exact_at(&mut bytes, offset).unwrap();
            visit(offset, &bytes);
        }
    }

    fn bytes_at(&self, offset: u64, num_bytes: usize) -> Option<&[u8]> {
        assert!(offset + num_bytes as u64 <= self.num_bytes());
        // SAFETY: within the mapping, which lives as long as this.
        Some(unsafe { std::slice::from_raw_parts(self.mapped.add(offset as usize), num_bytes) })
    }

    fn granule_bytes(&self) -> usize {
        GRANULE_BYTES
    }

    fn num_layers(&self) -> usize {
        NUM_LAYERS
    }
}
