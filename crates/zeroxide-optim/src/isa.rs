//! Which instruction set a kernel runs on, and the only `unsafe` of this crate: entering a function that
//! was compiled for more instructions than the crate as a whole.

use std::sync::OnceLock;

/// An instruction set that every kernel is compiled for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Isa {
    /// What the build target guarantees. On `x86_64` without fused multiply-add in the target this is slow
    /// (each `mul_add` is a library call) and exists so that the bits can be compared and so that the
    /// code runs everywhere.
    Baseline,
    /// AVX2 with FMA (`x86_64`, 2013 and later).
    Avx2,
    /// AVX-512 F, BW, DQ and VL (`x86_64` servers, AMD from Zen 4).
    Avx512,
}

impl Isa {
    /// Every instruction set, narrowest first.
    pub const ALL: [Self; 3] = [Self::Baseline, Self::Avx2, Self::Avx512];

    /// Whether this processor (and its operating system) can run it.
    #[cfg(target_arch = "x86_64")]
    pub fn is_supported(self) -> bool {
        match self {
            Self::Baseline => true,
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Avx512 => {
                Self::Avx2.is_supported()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
        }
    }

    /// Whether this processor can run it.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_supported(self) -> bool {
        self == Self::Baseline
    }

    /// Lower-case name, as reports print it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// # Panics
    /// If this processor cannot run it.
    pub(crate) fn require(self) {
        assert!(self.is_supported(), "this processor has no {}", self.name());
    }
}

/// The widest instruction set of this processor, found once.
pub fn isa() -> Isa {
    static WIDEST: OnceLock<Isa> = OnceLock::new();
    *WIDEST.get_or_init(|| {
        Isa::ALL
            .into_iter()
            .rev()
            .find(|isa| isa.is_supported())
            .unwrap_or(Isa::Baseline)
    })
}

/// Defines `$name(isa, arguments...)`, which runs the `#[inline(always)]` function `$body` compiled for
/// `isa`. The first bracket declares the generic parameters, the second passes them on.
///
/// The slices are arguments of the instantiated functions themselves, not fields of a struct: only so
/// does the compiler know that they do not overlap, without which it does not vectorise.
macro_rules! per_isa {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident [$($generics:tt)*] [$($generic:tt)*] ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)?
        = $body:expr;
    ) => {
        $(#[$meta])*
        $vis fn $name<$($generics)*>(isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2<$($generics)*>($($arg: $ty),*) $(-> $ret)? { $body }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512<$($generics)*>($($arg: $ty),*) $(-> $ret)? { $body }

            #[inline(never)]
            fn baseline<$($generics)*>($($arg: $ty),*) $(-> $ret)? { $body }

            isa.require();
            match isa {
                $crate::isa::Isa::Baseline => baseline::<$($generic)*>($($arg),*),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the processor has these instructions: `require` panicked otherwise.
                $crate::isa::Isa::Avx2 => unsafe { avx2::<$($generic)*>($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the processor has these instructions: `require` panicked otherwise.
                $crate::isa::Isa::Avx512 => unsafe { avx512::<$($generic)*>($($arg),*) },
                #[cfg(not(target_arch = "x86_64"))]
                _ => baseline::<$($generic)*>($($arg),*),
            }
        }
    };
}
pub(crate) use per_isa;
