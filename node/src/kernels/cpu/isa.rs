//! Which instructions this machine has. Found once at start; every form gives the same bits.

/// Instruction sets with a form of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 with VNNI and the tile unit's int8 products.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AVX-512 with VNNI: int8 products.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// AVX2 with FMA and F16C, as every processor since 2013 has them together.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// NEON with dot products of int8; the rest is what the compiler makes of plain loops, as all of these machines have NEON.
    #[cfg(target_arch = "aarch64")]
    Dotprod,
    /// Whatever the compiler makes of plain loops.
    Portable,
}

impl Isa {
    /// The widest that this machine has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let vnni = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni");
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            if vnni && avx2 {
                return if super::linear::amx::is_permitted() { Self::Amx } else { Self::Avx512Vnni };
            }
            if avx2 {
                return Self::Avx2;
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("dotprod") {
            return Self::Dotprod;
        }
        Self::Portable
    }

    /// Every set that this machine can run, widest first.
    pub fn all_here() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        let all = [Self::Amx, Self::Avx512Vnni, Self::Avx2, Self::Portable];
        #[cfg(target_arch = "aarch64")]
        let all = [Self::Dotprod, Self::Portable];
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let all = [Self::Portable];
        let widest = all.iter().position(|isa| *isa == Self::detect()).unwrap_or_default();
        all[widest..].to_vec()
    }

    /// Whether it has registers for sixteen sums of sixteen values; else for four.
    pub(super) fn has_many_registers(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return matches!(self, Self::Amx | Self::Avx512Vnni);
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => "amx",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => "avx512vnni",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "aarch64")]
            Self::Dotprod => "neon-dotprod",
            Self::Portable => "portable",
        }
    }
}

/// Compiles one plain function for each instruction set, and calls the one that `Isa` names. The body must be the same arithmetic in
/// the same order everywhere: the compiler only widens it, and never contracts a product and a sum.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::kernels::cpu::isa::Isa, $($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $type),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
            fn avx512($($arg: $type),*) $(-> $ret)? {
                body($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $type),*) $(-> $ret)? {
                body($($arg),*)
            }

            match isa {
                // SAFETY: this value of `Isa` exists only where the features were detected
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::isa::Isa::Amx | $crate::kernels::cpu::isa::Isa::Avx512Vnni => unsafe {
                    avx512($($arg),*)
                },
                // SAFETY: as above
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "aarch64")]
                $crate::kernels::cpu::isa::Isa::Dotprod => body($($arg),*),
                $crate::kernels::cpu::isa::Isa::Portable => body($($arg),*),
            }
        }
    };
}
pub(crate) use for_each_isa;
