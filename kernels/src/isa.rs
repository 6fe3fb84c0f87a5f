//! Instruction sets: detected once, chosen by a value that only exists where the machine has it.

use std::fmt;
use std::sync::OnceLock;

use crate::numerics::Order;

/// An instruction set that this machine is known to have. It cannot be made otherwise, which is what makes
/// calling the `target_feature` kernels sound.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Isa(pub(crate) Kind);

/// The variants behind [`Isa`], from the most portable to the fastest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) enum Kind {
    Portable,
    PortableTiles,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Amx,
}

/// Why an instruction set named by a user cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IsaError {
    /// The name is none of ours.
    Unknown {
        /// What was given.
        name: String,
    },
    /// The name is known, the machine lacks it.
    Missing {
        /// What was given.
        name: String,
        /// The names that would work here, separated by commas.
        available: String,
    },
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IsaError::Unknown { name } => {
                write!(f, "`{name}` is not an instruction set: use auto or one of {}", NAMES.join(", "))
            }
            IsaError::Missing { name, available } => {
                write!(f, "this machine lacks `{name}`: use one of {available}, or auto")
            }
        }
    }
}

impl std::error::Error for IsaError {}

/// What [`Isa::parse`] knows beside `auto`.
const NAMES: [&str; 7] = ["portable", "portable-tiles", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"];

impl Isa {
    /// Scalar code that runs anywhere: the references themselves.
    pub const PORTABLE: Isa = Isa(Kind::Portable);

    /// The same in the order of tiles.
    pub const PORTABLE_TILES: Isa = Isa(Kind::PortableTiles);

    /// In which order products of bf16 are added up. Instruction sets of one order give the same bits.
    pub fn order(self) -> Order {
        match self.0 {
            Kind::PortableTiles => Order::Tiles,
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => Order::Tiles,
            _ => Order::Pairs,
        }
    }

    /// The scalar code of the same order.
    pub fn reference(self) -> Isa {
        match self.order() {
            Order::Pairs => Isa::PORTABLE,
            Order::Tiles => Isa::PORTABLE_TILES,
        }
    }

    /// Whether this is scalar code.
    pub fn is_reference(self) -> bool {
        self == self.reference()
    }

    /// The fastest instruction set of this machine.
    pub fn detect() -> Isa {
        *Isa::available().last().expect("portable is always available")
    }

    /// All instruction sets of this machine, slowest first. Asked of the processor once.
    pub fn available() -> &'static [Isa] {
        static FOUND: OnceLock<Vec<Isa>> = OnceLock::new();
        FOUND.get_or_init(|| {
            #[allow(unused_mut)]
            let mut found = Isa::without_tiles().to_vec();
            // Every processor with tiles has the bf16 instructions, too.
            #[cfg(target_arch = "x86_64")]
            if found.contains(&Isa(Kind::Avx512Bf16)) && crate::amx::is_there() && Isa::tiles_refused().is_none() {
                found.push(Isa(Kind::Amx));
            }
            found
        })
    }

    /// All of them but the one that the system must be asked for.
    fn without_tiles() -> &'static [Isa] {
        static FOUND: OnceLock<Vec<Isa>> = OnceLock::new();
        FOUND.get_or_init(|| {
            #[allow(unused_mut)]
            let mut found = vec![Isa::PORTABLE_TILES, Isa::PORTABLE];
            #[cfg(target_arch = "x86_64")]
            if !cfg!(miri)
                && is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                found.push(Isa(Kind::Avx2));
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    found.push(Isa(Kind::Avx512));
                    if is_x86_feature_detected!("avx512vnni") {
                        found.push(Isa(Kind::Avx512Vnni));
                    }
                    // Every processor with the bf16 instructions has VNNI too; one without would lose only speed.
                    // Without this identity (a processor that rounds otherwise) bf16 is widened instead.
                    // SAFETY: called only where both features were found.
                    #[allow(unsafe_code)]
                    if is_x86_feature_detected!("avx512bf16")
                        && is_x86_feature_detected!("avx512vnni")
                        && unsafe { crate::simd::bf16_dot_product_is_the_fold(64) }
                    {
                        found.push(Isa(Kind::Avx512Bf16));
                    }
                }
            }
            found
        })
    }

    /// Why tiles that the processor has cannot be used, if it has some and they cannot. The system is asked for them
    /// here, once, by who detects, lists or names them.
    pub fn tiles_refused() -> Option<&'static str> {
        #[cfg(target_arch = "x86_64")]
        {
            static REFUSED: OnceLock<Option<&'static str>> = OnceLock::new();
            let find = || crate::amx::is_there().then(crate::amx::permit).and_then(Result::err);
            if cfg!(miri) { None } else { *REFUSED.get_or_init(find) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    /// The instruction set of that name: `auto`, `portable`, `avx2`, `avx512` (widen and multiply), `avx512vnni`
    /// (`vpdpbusd` for integers) or `avx512bf16` (`vdpbf16ps` too), which all give the same bits; `amx` (tiles), or
    /// `portable-tiles`, which gives the bits of `amx` anywhere.
    ///
    /// # Errors
    /// The name is unknown, or the machine lacks the instruction set.
    pub fn parse(name: &str) -> Result<Isa, IsaError> {
        if name == "auto" {
            return Ok(Isa::detect());
        }
        if !NAMES.contains(&name) {
            return Err(IsaError::Unknown { name: name.to_owned() });
        }
        let of_name = |found: &[Isa]| found.iter().copied().find(|isa| isa.name() == name);
        let found = of_name(Isa::without_tiles()).or_else(|| of_name(Isa::available()));
        found.ok_or_else(|| IsaError::Missing {
            name: name.to_owned(),
            available: Isa::available().iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", "),
        })
    }

    /// The name that [`Isa::parse`] accepts.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            Kind::PortableTiles => "portable-tiles",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Vnni => "avx512vnni",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Bf16 => "avx512bf16",
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => "amx",
        }
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_instruction_set() {
        for &isa in Isa::available() {
            assert_eq!(Isa::parse(isa.name()), Ok(isa));
        }
        assert_eq!(Isa::parse("auto"), Ok(Isa::detect()));
        assert_eq!(Isa::available()[..2], [Isa::PORTABLE_TILES, Isa::PORTABLE], "the last one is what auto takes");
        assert_eq!(Isa::parse("sse9"), Err(IsaError::Unknown { name: "sse9".to_owned() }));
    }

    /// `vdpbf16ps` is `fma(low, low', fma(high, high', acc))` on Zen 4, Zen 5 and by Intel's documentation;
    /// a machine where this fails still computes the same bits, through `avx512`.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn bf16_dot_product_of_this_machine_is_the_specified_fold() {
        if is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni") && !cfg!(miri) {
            // SAFETY: the feature was found, and AVX-512F comes with it.
            #[allow(unsafe_code)]
            let holds = unsafe { crate::simd::bf16_dot_product_is_the_fold(20_000) };
            assert!(holds);
            assert!(Isa::available().iter().any(|isa| isa.name() == "avx512bf16"));
        }
    }

    /// As Intel documents it. A machine where this fails has no `amx`, and computes in the order of pairs.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn product_of_tiles_of_this_machine_is_the_specified_fold() {
        if !cfg!(miri) && crate::amx::is_there() && is_x86_feature_detected!("avx512bf16") {
            assert_eq!(Isa::tiles_refused(), None);
            assert_eq!(Isa::detect().name(), "amx");
            // SAFETY: the instruction set was found.
            #[allow(unsafe_code)]
            let holds = unsafe { crate::amx::product_is_the_fold_of_blocks(500) };
            assert!(holds);
        }
    }

    #[test]
    fn every_instruction_set_has_the_scalar_code_of_its_order() {
        for &isa in Isa::available() {
            assert_eq!(isa.reference().order(), isa.order());
            assert!(isa.reference().is_reference());
        }
        assert_ne!(Isa::PORTABLE.order().family(), Isa::PORTABLE_TILES.order().family());
    }
}
