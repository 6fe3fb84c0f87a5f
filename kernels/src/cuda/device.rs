//! What the operations need of a device, and memory on one.
//!
//! Two implementations: a GPU through NVIDIA's driver, and the host, where kernels run as fibres; the second is
//! for tests, and so exact about arguments and bounds as no GPU is.
//!
//! **Order.** A device has two lanes. Launches, products and copies on [`Lane::Compute`] happen one after the other,
//! behind the caller's back; an [`Event`] tells when. A copy on [`Lane::Transfer`] is done when the call returns, and
//! passes by what computes: whoever calls knows that nobody else touches those bytes, as with the
//! [arena](crate::arena) on the host.
//!
//! **Graphs.** What a thread launches on [`Lane::Compute`] between [`begin_capture`](Device::begin_capture) and
//! [`end_capture`](Device::end_capture) is recorded and not done; other threads and the other lane go on as ever.
#![allow(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use super::graph::Graph;

/// Why a device does not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceError {
    /// This program has no part that speaks to GPUs.
    NotBuilt,
    /// The machine has no NVIDIA driver.
    NoDriver,
    /// There are fewer devices.
    Missing {
        /// Asked for.
        ordinal: usize,
        /// How many there are.
        num_devices: usize,
    },
    /// The driver refused.
    Refused {
        /// What was asked of it, as a verb phrase.
        asked: String,
        /// What it said.
        reason: String,
    },
    /// A kernel file has no image for the device.
    Image(String),
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceError::NotBuilt => f.write_str(
                "this program was built without CUDA: build it with --features cuda (and CUDA_HOME set to a CUDA 13 \
                 toolkit), or use the CPU",
            ),
            DeviceError::NoDriver => f.write_str(
                "this machine has no NVIDIA driver (libcuda.so.1 is not there): install one, or use the CPU",
            ),
            DeviceError::Missing { ordinal, num_devices } => {
                write!(f, "cuda:{ordinal} was asked for, and the driver knows {num_devices} GPUs, counted from 0")
            }
            DeviceError::Refused { asked, reason } => write!(f, "the device cannot {asked}: {reason}"),
            DeviceError::Image(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for DeviceError {}

impl DeviceError {
    /// Whether there is simply no GPU for this program, as against one that fails.
    pub fn is_absence(&self) -> bool {
        matches!(self, DeviceError::NotBuilt | DeviceError::NoDriver | DeviceError::Missing { .. })
    }
}

/// Which order a copy is part of; see the [module](self).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// That of the launches.
    Compute,
    /// None: it is done when the call returns.
    Transfer,
}

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Not taken by anybody.
    pub free_bytes: usize,
    /// All of it.
    pub total_bytes: usize,
}

/// A point in the order of [`Lane::Compute`].
pub trait Event: Send + Sync {
    /// Waits until everything before it is done.
    ///
    /// # Errors
    /// What the device says, also of what it was to do before.
    fn wait(&self) -> Result<(), DeviceError>;
}

/// Bytes on their way from a device to the host.
pub trait Landing: Send + Sync {
    /// They, once they are there.
    ///
    /// # Errors
    /// What the device says, also of what it was to do before.
    fn bytes(&self) -> Result<&[u8], DeviceError>;
}

/// A kernel, how many of its blocks and threads, and what it is given.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Name of the kernel, as in `kernels/cuda`.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Arguments, in order.
    pub args: &'a Args,
}

/// Values for a kernel's parameters, each as its bytes.
#[derive(Debug, Default, Clone)]
pub struct Args {
    /// Each value begins at a word of its own.
    words: [u64; 32],
    num_words: usize,
    /// First word and size in bytes.
    places: [(usize, usize); 16],
    num: usize,
    /// A bit for each value that is an address.
    addresses: u16,
    /// That of the memory which a tensor map among the values describes.
    mapped: Option<u64>,
}

impl Args {
    /// Appends an address, or null.
    pub(super) fn address(mut self, address: u64) -> Self {
        self.addresses |= 1 << self.num;
        self.bytes(&address.to_ne_bytes())
    }

    /// Appends a tensor map of the memory at `address`, of which there is one at most.
    pub(super) fn tensor_map(mut self, map: &TensorMap, address: u64) -> Self {
        self.mapped = Some(address);
        self.bytes(map.0.map(u64::to_ne_bytes).as_flattened())
    }

    pub(super) fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(super) fn u32(self, value: usize) -> Self {
        self.bytes(&u32::try_from(value).expect("sizes of a launch fit 32 bits").to_ne_bytes())
    }

    pub(super) fn f32(self, value: f32) -> Self {
        self.bytes(&value.to_ne_bytes())
    }

    /// Appends a structure of 32-bit fields.
    pub(super) fn fields<const N: usize>(self, fields: [u32; N]) -> Self {
        self.bytes(as_bytes(&fields))
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.places[self.num] = (self.num_words, bytes.len());
        self.num += 1;
        for piece in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..piece.len()].copy_from_slice(piece);
            self.words[self.num_words] = u64::from_ne_bytes(word);
            self.num_words += 1;
        }
        self
    }

    /// Where each value lies and its size in bytes.
    pub fn values(&self) -> impl Iterator<Item = (*const u8, usize)> + '_ {
        self.places[..self.num].iter().map(|(word, size)| (self.words[*word..].as_ptr().cast(), *size))
    }

    /// Those that are addresses, and the one that is in a tensor map.
    #[cfg_attr(not(any(feature = "cuda", feature = "fibres")), allow(dead_code, reason = "for graphs of a device"))]
    pub(super) fn addresses(&self) -> impl Iterator<Item = u64> + '_ {
        let places = self.places[..self.num].iter().enumerate();
        let named = places.filter(|(index, _)| self.addresses >> index & 1 == 1);
        named.map(|(_, (word, _))| self.words[*word]).chain(self.mapped)
    }
}

/// A product of bf16 matrices into f32: `out[m, n] = x[m, k] w[n, k]^T (+ bias[n]) (+ out)`, all row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// Address of `[m, k]`.
    pub x: u64,
    /// Address of `[n, k]`.
    pub w: u64,
    /// Address of f32 `[n]`, or 0.
    pub bias: u64,
    /// Address of `[m, n]`.
    pub out: u64,
    /// Rows.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// What is summed over.
    pub k: usize,
    /// Whether to add to what is there.
    pub add: bool,
}

/// A packed tensor of bf16 in device memory, and the box of it that one bulk copy brings, the innermost dimension first.
/// Lines of the box are 128 bytes and come with the 128-byte swizzle, see `hopper.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BoxedTensor {
    /// Where it begins: a multiple of 16.
    pub address: u64,
    /// Values along each dimension.
    pub dims: [u64; 4],
    /// Of the box; along the innermost dimension 64.
    pub box_dims: [u32; 4],
}

/// A [`BoxedTensor`] as a kernel takes it: the device knows what is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap(pub(super) [u64; 16]);

/// A processor with memory of its own that runs the kernels of `kernels/cuda`.
pub trait Device: Send + Sync {
    /// Which it is, for people.
    fn name(&self) -> String;

    /// Number of the GPU that its memory is on, as the driver counts in this process; `None`: the memory is the host's.
    fn gpu(&self) -> Option<usize> {
        None
    }

    /// Makes it the calling thread's, for a library that asks the driver by itself.
    ///
    /// # Errors
    /// What the driver says.
    fn enter(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Its memory.
    ///
    /// # Errors
    /// What the driver says.
    fn memory(&self) -> Result<MemoryInfo, DeviceError>;

    /// Shared memory that a block of threads can have at most, in bytes.
    fn shared_bytes_max(&self) -> usize;

    /// Address of `num_bytes` of its memory, at a multiple of 16.
    ///
    /// # Errors
    /// What the driver says, for example that there is not as much.
    fn alloc(&self, num_bytes: usize) -> Result<u64, DeviceError>;

    /// As [`alloc`](Self::alloc), memory that [`export`](Self::export) takes.
    ///
    /// # Errors
    /// As [`alloc`](Self::alloc).
    fn alloc_shared(&self, num_bytes: usize) -> Result<u64, DeviceError> {
        self.alloc(num_bytes)
    }

    /// A handle of memory for other processes of this host.
    ///
    /// # Errors
    /// What the driver says.
    fn export(&self, address: u64) -> Result<Vec<u8>, DeviceError>;

    /// Address at which this process can read `num_bytes` of memory that another has [exported](Self::export).
    ///
    /// # Errors
    /// What the driver says; that there is less.
    fn open_export(&self, handle: &[u8], num_bytes: usize) -> Result<u64, DeviceError>;

    /// Ends what [`open_export`](Self::open_export) began.
    ///
    /// # Safety
    /// `address` came from there and is not used again.
    unsafe fn close_export(&self, address: u64);

    /// Gives memory back, once everything that was launched is done with it.
    ///
    /// # Safety
    /// `address` came from [`alloc`](Self::alloc) of this device and is not used again.
    unsafe fn free(&self, address: u64);

    /// Copies to places of the device, (address, bytes) each, what lies one behind the other in `from`. `from` may be
    /// changed when the call returns.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// The places have `from.len()` bytes in all, each in this device's memory; nobody else uses them at that point of the
    /// lane.
    unsafe fn copy_in(&self, lane: Lane, places: &[(u64, usize)], from: &[u8]) -> Result<(), DeviceError>;

    /// Copies from places of the device, (address, bytes) each, one behind the other to `to`; done when the call returns,
    /// on [`Lane::Compute`] also everything before.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// The places have `to.len()` bytes in all, each in this device's memory; nobody changes them at that point of the lane.
    unsafe fn copy_out(&self, lane: Lane, places: &[(u64, usize)], to: &mut [u8]) -> Result<(), DeviceError>;

    /// Starts copying `num_bytes` from the device on [`Lane::Compute`], behind what is there and before what comes.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// As of [`copy_out`](Self::copy_out).
    unsafe fn start_copy_out(&self, from: u64, num_bytes: usize) -> Result<Box<dyn Landing>, DeviceError>;

    /// Copies within the device; the ranges do not overlap.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// As of [`copy_in`](Self::copy_in) and [`copy_out`](Self::copy_out).
    unsafe fn copy_within(&self, lane: Lane, from: u64, to: u64, num_bytes: usize) -> Result<(), DeviceError>;

    /// Copies within the device, or from memory of another that was opened: (from, to, bytes) each, one wait for all.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// As of [`copy_within`](Self::copy_within), each.
    unsafe fn copy_all_within(&self, lane: Lane, copies: &[(u64, u64, usize)]) -> Result<(), DeviceError>;

    /// Zeroes memory.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// As of [`copy_in`](Self::copy_in).
    unsafe fn zero(&self, lane: Lane, at: u64, num_bytes: usize) -> Result<(), DeviceError>;

    /// Launches a kernel on a lane.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// The arguments are what stands on top of the kernel's file.
    unsafe fn launch(&self, lane: Lane, launch: &Launch<'_>) -> Result<(), DeviceError>;

    /// From here on launches on [`Lane::Compute`] may begin while the one ahead of each ends: programmatic dependent launch.
    /// Every kernel waits by itself for what it reads.
    ///
    /// # Errors
    /// Why the device cannot, as a sentence.
    fn enable_pdl(&self) -> Result<(), String> {
        Err(format!("{} has no launches that overlap", self.name()))
    }

    /// Whether it has the kernels for compute capability 9.0 alone.
    ///
    /// # Errors
    /// Why not, as a sentence.
    fn check_hopper_kernels(&self) -> Result<(), String>;

    /// What a kernel that copies boxes of `tensor` is given.
    ///
    /// # Errors
    /// What the driver says.
    fn tensor_map(&self, tensor: &BoxedTensor) -> Result<TensorMap, DeviceError>;

    /// Whether it has a product for many rows.
    fn has_product(&self) -> bool;

    /// Multiplies on [`Lane::Compute`], if the device [has it](Self::has_product).
    ///
    /// # Errors
    /// What the library says.
    ///
    /// # Safety
    /// The addresses begin matrices of the stated shapes in this device's memory.
    unsafe fn multiply(&self, product: &Product) -> Result<(), DeviceError>;

    /// The point that [`Lane::Compute`] has come to.
    ///
    /// # Errors
    /// What the driver says.
    fn record(&self) -> Result<Box<dyn Event>, DeviceError>;

    /// From here on what this thread launches on [`Lane::Compute`] is recorded and not done, until
    /// [`end_capture`](Self::end_capture). Launches, products, copies within the device and zeroing can be recorded;
    /// copies from and to the host and events are refused, and memory cannot be taken or given back.
    ///
    /// # Errors
    /// What the driver says; that this thread is recording already.
    fn begin_capture(&self) -> Result<(), DeviceError>;

    /// What was recorded.
    ///
    /// # Errors
    /// What the driver says; that this thread is not recording.
    fn end_capture(self: Arc<Self>) -> Result<Box<dyn Graph>, DeviceError>;
}

/// Memory on a device. Bounds are checked here; who may touch what is the users' agreement, as with the
/// [arena](crate::arena).
pub struct Buffer {
    device: Arc<dyn Device>,
    address: u64,
    num_bytes: usize,
}

impl Buffer {
    /// So much memory, holding anything.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(device: &Arc<dyn Device>, num_bytes: usize) -> Result<Self, DeviceError> {
        Ok(Self::from_alloc(device, device.alloc(num_bytes.max(1))?, num_bytes))
    }

    pub(super) fn from_alloc(device: &Arc<dyn Device>, address: u64, num_bytes: usize) -> Self {
        Self { device: device.clone(), address, num_bytes }
    }

    /// A copy of host values, there when the call returns.
    ///
    /// # Errors
    /// What the driver says.
    pub fn of<T: Plain>(device: &Arc<dyn Device>, values: &[T]) -> Result<Self, DeviceError> {
        let bytes = as_bytes(values);
        let buffer = Self::new(device, bytes.len())?;
        buffer.write(Lane::Transfer, 0, bytes)?;
        Ok(buffer)
    }

    /// Where it is.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Size in bytes.
    pub fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// Address of `num_bytes` bytes at `offset`. Panics beyond the end.
    pub(super) fn at(&self, offset: usize, num_bytes: usize) -> u64 {
        assert!(
            offset <= self.num_bytes && num_bytes <= self.num_bytes - offset,
            "bytes {offset}..+{num_bytes} lie outside a buffer of {}",
            self.num_bytes
        );
        self.address + offset as u64
    }

    /// Copies `from` to `offset`. Panics beyond the end.
    ///
    /// # Errors
    /// What the driver says.
    pub fn write(&self, lane: Lane, offset: usize, from: &[u8]) -> Result<(), DeviceError> {
        self.write_places(lane, &[(offset, from.len())], from)
    }

    /// Copies what lies one behind the other in `from` to places, (offset, bytes) each, with one wait for all. Panics
    /// beyond the end, and if there are not as many bytes as the places have.
    ///
    /// # Errors
    /// What the driver says.
    pub fn write_places(&self, lane: Lane, places: &[(usize, usize)], from: &[u8]) -> Result<(), DeviceError> {
        let places = self.all_at(places, from.len());
        // SAFETY: in bounds by `at`; that nobody else uses these bytes is the users' agreement.
        unsafe { self.device.copy_in(lane, &places, from) }
    }

    /// Copies what is at `offset` to `into`. Panics beyond the end.
    ///
    /// # Errors
    /// What the driver says.
    pub fn read(&self, lane: Lane, offset: usize, into: &mut [u8]) -> Result<(), DeviceError> {
        self.read_places(lane, &[(offset, into.len())], into)
    }

    /// Copies what is at places, (offset, bytes) each, one behind the other to `into`, with one wait for all. Panics beyond
    /// the end, and if there are not as many bytes as the places have.
    ///
    /// # Errors
    /// What the driver says.
    pub fn read_places(&self, lane: Lane, places: &[(usize, usize)], into: &mut [u8]) -> Result<(), DeviceError> {
        let places = self.all_at(places, into.len());
        // SAFETY: as in `write_places`.
        unsafe { self.device.copy_out(lane, &places, into) }
    }

    /// Addresses of places that have `num_bytes` in all.
    fn all_at(&self, places: &[(usize, usize)], num_bytes: usize) -> Vec<(u64, usize)> {
        let held: usize = places.iter().map(|(_, num_bytes)| num_bytes).sum();
        assert_eq!(held, num_bytes, "bytes of the places, and those that are copied");
        places.iter().map(|&(offset, num_bytes)| (self.at(offset, num_bytes), num_bytes)).collect()
    }

    /// Starts copying `num_bytes` at `offset` to the host, in the order of [`Lane::Compute`]. Panics beyond the end.
    ///
    /// # Errors
    /// What the driver says.
    pub fn start_read(&self, offset: usize, num_bytes: usize) -> Result<Box<dyn Landing>, DeviceError> {
        let from = self.at(offset, num_bytes);
        // SAFETY: as in `write_places`.
        unsafe { self.device.start_copy_out(from, num_bytes) }
    }

    /// Copies from another buffer of the device. Panics beyond the end of either.
    ///
    /// # Errors
    /// What the driver says.
    pub fn copy_from(
        &self,
        lane: Lane,
        offset: usize,
        from: &Buffer,
        from_offset: usize,
        num_bytes: usize,
    ) -> Result<(), DeviceError> {
        let (to, from) = (self.at(offset, num_bytes), from.at(from_offset, num_bytes));
        assert!(from + num_bytes as u64 <= to || to + num_bytes as u64 <= from, "ranges of a copy do not overlap");
        // SAFETY: as in `write_places`; the ranges do not overlap.
        unsafe { self.device.copy_within(lane, from, to, num_bytes) }
    }

    /// Zeroes `num_bytes` at `offset`. Panics beyond the end.
    ///
    /// # Errors
    /// What the driver says.
    pub fn zero(&self, lane: Lane, offset: usize, num_bytes: usize) -> Result<(), DeviceError> {
        let at = self.at(offset, num_bytes);
        // SAFETY: as in `write_places`.
        unsafe { self.device.zero(lane, at, num_bytes) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`; whoever holds the address after that is within a launch, which `free` waits for.
        unsafe { self.device.free(self.address) }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("num_bytes", &self.num_bytes).finish_non_exhaustive()
    }
}

/// Numbers without padding, of which every pattern of bits is one.
///
/// # Safety
/// That they are.
pub unsafe trait Plain: Copy {}
// SAFETY: a number.
unsafe impl Plain for u8 {}
// SAFETY: a number.
unsafe impl Plain for u32 {}
// SAFETY: a number.
unsafe impl Plain for f32 {}
// SAFETY: 16 bits, transparently.
unsafe impl Plain for half::bf16 {}

/// The bytes of values, as they lie in memory.
pub fn as_bytes<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain values have no padding; the length is theirs in bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}
