//! Quantities with units, as the language writes them and as the code computes with them.
//!
//! Enters: text such as `72 GiB`, `450 GB/s`, `2 %`. Leaves: a [`Quantity`] that remembers its
//! spelling, or one of the newtypes [`Bytes`], [`Flops`], [`Seconds`], [`BytesPerSecond`],
//! [`FlopsPerSecond`], [`Ratio`], always in base units.
//! Invariant: `{}` of a newtype is for people (three digits), `{:#}` is exact and reparses to the
//! same value; a [`Quantity`] prints as it was written.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, Sub};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What went wrong while reading a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// The text is not a number followed by a unit.
    #[error("`{text}` is not a quantity; write a number and a unit, such as `{example}`")]
    Invalid { text: String, example: &'static str },
    /// The unit exists but measures something else.
    #[error("`{text}` is {found}, but {expected} is needed, such as `{example}`")]
    WrongMeasure {
        text: String,
        found: Measure,
        expected: Measure,
        example: &'static str,
    },
    /// The value is negative, fractional in base units, or too large.
    #[error("`{text}` is out of range: {expected} lies between {lowest} and {highest}")]
    OutOfRange {
        text: String,
        expected: Measure,
        lowest: &'static str,
        highest: &'static str,
    },
}

/// What a unit measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    Bytes,
    Time,
    Bandwidth,
    Flops,
    Throughput,
    Ratio,
}

impl Measure {
    /// A quantity of this measure, for messages.
    pub fn example(self) -> &'static str {
        match self {
            Self::Bytes => "72 GiB",
            Self::Time => "60 s",
            Self::Bandwidth => "450 GB/s",
            Self::Flops => "3 TFLOP",
            Self::Throughput => "989 TFLOPS",
            Self::Ratio => "2 %",
        }
    }
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bytes => "a size in bytes",
            Self::Time => "a time",
            Self::Bandwidth => "a bandwidth",
            Self::Flops => "an amount of work",
            Self::Throughput => "a throughput",
            Self::Ratio => "a percentage",
        })
    }
}

macro_rules! units {
    ($($variant:ident $text:literal $measure:ident $scale:expr;)*) => {
        /// A unit of the language. The set is closed; spelling is case-sensitive.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Unit { $(#[serde(rename = $text)] $variant,)* }

        impl Unit {
            /// All units, in the order of their table.
            pub const ALL: &'static [Unit] = &[$(Unit::$variant,)*];

            /// The spelling in the language.
            pub fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// What it measures.
            pub fn measure(self) -> Measure {
                match self { $(Self::$variant => Measure::$measure,)* }
            }

            /// How many base units (bytes, seconds, bytes/s, flops, flops/s, 1) one of it is.
            pub fn scale(self) -> f64 {
                match self { $(Self::$variant => $scale,)* }
            }
        }
    };
}

const KI: f64 = 1024.0;

units! {
    Byte "B" Bytes 1.0;
    Kilobyte "KB" Bytes 1e3;
    Megabyte "MB" Bytes 1e6;
    Gigabyte "GB" Bytes 1e9;
    Terabyte "TB" Bytes 1e12;
    Kibibyte "KiB" Bytes KI;
    Mebibyte "MiB" Bytes KI * KI;
    Gibibyte "GiB" Bytes KI * KI * KI;
    Tebibyte "TiB" Bytes KI * KI * KI * KI;
    Nanosecond "ns" Time 1e-9;
    Microsecond "us" Time 1e-6;
    Millisecond "ms" Time 1e-3;
    Second "s" Time 1.0;
    Minute "min" Time 60.0;
    Hour "h" Time 3600.0;
    BytePerSecond "B/s" Bandwidth 1.0;
    KilobytePerSecond "KB/s" Bandwidth 1e3;
    MegabytePerSecond "MB/s" Bandwidth 1e6;
    GigabytePerSecond "GB/s" Bandwidth 1e9;
    TerabytePerSecond "TB/s" Bandwidth 1e12;
    MebibytePerSecond "MiB/s" Bandwidth KI * KI;
    GibibytePerSecond "GiB/s" Bandwidth KI * KI * KI;
    GigabitPerSecond "Gbit/s" Bandwidth 1e9 / 8.0;
    Flop "FLOP" Flops 1.0;
    Megaflop "MFLOP" Flops 1e6;
    Gigaflop "GFLOP" Flops 1e9;
    Teraflop "TFLOP" Flops 1e12;
    Petaflop "PFLOP" Flops 1e15;
    FlopPerSecond "FLOPS" Throughput 1.0;
    MegaflopPerSecond "MFLOPS" Throughput 1e6;
    GigaflopPerSecond "GFLOPS" Throughput 1e9;
    TeraflopPerSecond "TFLOPS" Throughput 1e12;
    PetaflopPerSecond "PFLOPS" Throughput 1e15;
    Percent "%" Ratio 0.01;
}

impl Unit {
    /// The unit of that spelling, if there is one.
    pub fn lookup(text: &str) -> Option<Unit> {
        Self::ALL.iter().copied().find(|unit| unit.text() == text)
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

/// A literal number: an integer stays an integer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Number {
    Int(i64),
    /// Always finite.
    Float(f64),
}

impl Number {
    /// Reads `4096`, `50_304`, `-1`, `1e-3`, `0.95`; `None` when it is no finite number.
    pub fn parse(text: &str) -> Option<Number> {
        let digits = text.strip_prefix('-').unwrap_or(text);
        let starts_and_ends = digits.starts_with(|c: char| c.is_ascii_digit())
            && digits.ends_with(|c: char| c.is_ascii_digit());
        if !starts_and_ends {
            return None;
        }
        let plain: String = text.chars().filter(|&c| c != '_').collect();
        if plain.chars().all(|c| c.is_ascii_digit() || c == '-') {
            return plain.parse().ok().map(Number::Int);
        }
        let value: f64 = plain.parse().ok()?;
        value.is_finite().then_some(Number::Float(value))
    }

    /// The value as a float; integers above 2^53 round.
    pub fn as_f64(self) -> f64 {
        match self {
            Self::Int(value) => value as f64,
            Self::Float(value) => value,
        }
    }

    /// The value as a count: a nonnegative integer.
    pub fn as_u64(self) -> Option<u64> {
        match self {
            Self::Int(value) => u64::try_from(value).ok(),
            Self::Float(_) => None,
        }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(value) => write!(f, "{value}"),
            // `Debug` is the shortest text that reparses to the same float.
            Self::Float(value) => write!(f, "{value:?}"),
        }
    }
}

impl From<i64> for Number {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<i32> for Number {
    fn from(value: i32) -> Self {
        Self::Int(i64::from(value))
    }
}

impl From<f64> for Number {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

/// A number with its unit, as written.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Quantity {
    pub value: Number,
    pub unit: Unit,
}

impl Quantity {
    /// A quantity from its parts.
    pub fn new(value: impl Into<Number>, unit: Unit) -> Self {
        Self {
            value: value.into(),
            unit,
        }
    }

    /// What it measures.
    pub fn measure(self) -> Measure {
        self.unit.measure()
    }

    /// The value in base units, if it is of `expected`.
    ///
    /// # Errors
    /// [`UnitError::WrongMeasure`] when the unit measures something else.
    pub fn base(self, expected: Measure) -> Result<f64, UnitError> {
        if self.measure() == expected {
            Ok(self.value.as_f64() * self.unit.scale())
        } else {
            Err(UnitError::WrongMeasure {
                text: self.to_string(),
                found: self.measure(),
                expected,
                example: expected.example(),
            })
        }
    }

    /// As bytes, rounded to a whole number.
    ///
    /// # Errors
    /// [`UnitError::WrongMeasure`]; [`UnitError::OutOfRange`] when negative or above 2^63 bytes.
    pub fn bytes(self) -> Result<Bytes, UnitError> {
        // 2^63: every float below it converts to u64 exactly.
        const HIGHEST: f64 = 9_223_372_036_854_775_808.0;
        let value = self.base(Measure::Bytes)?.round();
        if !(0.0..HIGHEST).contains(&value) {
            return Err(UnitError::OutOfRange {
                text: self.to_string(),
                expected: Measure::Bytes,
                lowest: "0 B",
                highest: "8 EiB",
            });
        }
        // A plain integer of bytes must not round through a float.
        match (self.value.as_u64(), self.unit) {
            (Some(count), Unit::Byte) => Ok(Bytes(count)),
            _ => Ok(Bytes(value as u64)),
        }
    }

    /// As seconds.
    ///
    /// # Errors
    /// [`UnitError::WrongMeasure`] when it is not a time.
    pub fn seconds(self) -> Result<Seconds, UnitError> {
        self.base(Measure::Time).map(Seconds)
    }

    /// As bytes per second.
    ///
    /// # Errors
    /// [`UnitError::WrongMeasure`] when it is not a bandwidth.
    pub fn bytes_per_second(self) -> Result<BytesPerSecond, UnitError> {
        self.base(Measure::Bandwidth).map(BytesPerSecond)
    }

    /// As floating-point operations per second.
    ///
    /// # Errors
    /// [`UnitError::WrongMeasure`] when it is not a throughput.
    pub fn flops_per_second(self) -> Result<FlopsPerSecond, UnitError> {
        self.base(Measure::Throughput).map(FlopsPerSecond)
    }

    /// As a ratio: `2 %` is 0.02.
    ///
    /// # Errors
    /// [`UnitError::WrongMeasure`] when it is not a percentage.
    pub fn ratio(self) -> Result<Ratio, UnitError> {
        self.base(Measure::Ratio).map(Ratio)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.value, self.unit)
    }
}

impl FromStr for Quantity {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let invalid = || UnitError::Invalid {
            text: text.to_owned(),
            example: "72 GiB",
        };
        let trimmed = text.trim();
        // The longest prefix that is a number, so that `1e-3 s` and `72GiB` both split right.
        (1..=trimmed.len())
            .rev()
            .filter(|&at| trimmed.is_char_boundary(at))
            .find_map(|at| {
                let (number, unit) = trimmed.split_at(at);
                let value = Number::parse(number)?;
                Unit::lookup(unit.trim_start()).map(|unit| Quantity { value, unit })
            })
            .ok_or_else(invalid)
    }
}

/// A size in bytes.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// The value as a float, for prices.
    pub fn as_f64(self) -> f64 {
        self.0 as f64
    }

    /// The sum, or the largest size when it does not fit.
    pub fn saturating_add(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_add(other.0))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.alternate() {
            let exact = [
                Unit::Tebibyte,
                Unit::Gibibyte,
                Unit::Mebibyte,
                Unit::Kibibyte,
            ]
            .into_iter()
            .find(|unit| self.0 > 0 && self.0.is_multiple_of(unit.scale() as u64));
            return match exact {
                Some(unit) => write!(f, "{} {unit}", self.0 / unit.scale() as u64),
                None => write!(f, "{} B", self.0),
            };
        }
        let ladder = [
            Unit::Tebibyte,
            Unit::Gibibyte,
            Unit::Mebibyte,
            Unit::Kibibyte,
        ];
        human(f, self.as_f64(), &ladder, Unit::Byte)
    }
}

impl FromStr for Bytes {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        text.parse::<Quantity>()?.bytes()
    }
}

impl Add for Bytes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
        Self(items.map(|item| item.0).sum())
    }
}

macro_rules! float_quantity {
    ($(#[$doc:meta])* $name:ident $measure:ident base $base:ident ladder [$($unit:ident),*]) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, PartialOrd, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub f64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                if f.alternate() {
                    return exact(f, self.0, Unit::$base);
                }
                human(f, self.0, &[$(Unit::$unit),*], Unit::$base)
            }
        }

        impl FromStr for $name {
            type Err = UnitError;

            fn from_str(text: &str) -> Result<Self, UnitError> {
                text.parse::<Quantity>()?.base(Measure::$measure).map(Self)
            }
        }

        impl Add for $name {
            type Output = Self;

            fn add(self, other: Self) -> Self {
                Self(self.0 + other.0)
            }
        }

        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                self.0 += other.0;
            }
        }

        impl Sub for $name {
            type Output = Self;

            fn sub(self, other: Self) -> Self {
                Self(self.0 - other.0)
            }
        }

        impl Mul<f64> for $name {
            type Output = Self;

            fn mul(self, factor: f64) -> Self {
                Self(self.0 * factor)
            }
        }

        impl Sum for $name {
            fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
                Self(items.map(|item| item.0).sum())
            }
        }
    };
}

float_quantity! {
    /// A number of floating-point operations.
    Flops Flops base Flop ladder [Petaflop, Teraflop, Gigaflop, Megaflop]
}
float_quantity! {
    /// A time in seconds.
    Seconds Time base Second ladder [Second, Millisecond, Microsecond, Nanosecond]
}
float_quantity! {
    /// A bandwidth in bytes per second.
    BytesPerSecond Bandwidth base BytePerSecond
    ladder [TerabytePerSecond, GigabytePerSecond, MegabytePerSecond, KilobytePerSecond]
}
float_quantity! {
    /// A throughput in floating-point operations per second.
    FlopsPerSecond Throughput base FlopPerSecond
    ladder [PetaflopPerSecond, TeraflopPerSecond, GigaflopPerSecond, MegaflopPerSecond]
}
float_quantity! {
    /// A share: 0.02 is 2 %.
    Ratio Ratio base Percent ladder [Percent]
}

impl Div<BytesPerSecond> for Bytes {
    type Output = Seconds;

    fn div(self, rate: BytesPerSecond) -> Seconds {
        Seconds(self.as_f64() / rate.0)
    }
}

impl Div<FlopsPerSecond> for Flops {
    type Output = Seconds;

    fn div(self, rate: FlopsPerSecond) -> Seconds {
        Seconds(self.0 / rate.0)
    }
}

/// Writes `value` so that it reparses to the same float: in the base unit where scaling is free.
fn exact(f: &mut fmt::Formatter<'_>, value: f64, base: Unit) -> fmt::Result {
    if base.scale() == 1.0 {
        return write!(f, "{value:?} {base}");
    }
    // Percent: search the neighbors for the number that scales back to `value` exactly.
    let near = value / base.scale();
    let candidates = [near, near.next_up(), near.next_down()];
    let back = candidates.into_iter().find(|c| c * base.scale() == value);
    write!(f, "{:?} {base}", back.unwrap_or(near))
}

/// Writes `value` with three digits in the largest unit of `ladder` that does not make it < 1.
fn human(f: &mut fmt::Formatter<'_>, value: f64, ladder: &[Unit], base: Unit) -> fmt::Result {
    let fits = |unit: &&Unit| value.abs() >= unit.scale() * 0.9995;
    let unit = match ladder.iter().find(fits) {
        Some(unit) => *unit,
        None if value == 0.0 => base,
        None => ladder
            .last()
            .copied()
            .filter(|unit| unit.scale() < base.scale())
            .unwrap_or(base),
    };
    let scaled = value / unit.scale();
    let decimals = match scaled.abs() {
        x if x >= 99.95 => 0,
        x if x >= 9.995 => 1,
        _ => 2,
    };
    let text = format!("{scaled:.decimals$}");
    let text = match text.split_once('.') {
        Some(_) => text.trim_end_matches('0').trim_end_matches('.'),
        None => text.as_str(),
    };
    write!(f, "{text} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_three_digits() {
        assert_eq!(Bytes(72 << 30).to_string(), "72 GiB");
        assert_eq!(Bytes(97_924_000_000).to_string(), "91.2 GiB");
        assert_eq!(Bytes(0).to_string(), "0 B");
        assert_eq!(Bytes(1023).to_string(), "1023 B");
        assert_eq!(Seconds(0.01234).to_string(), "12.3 ms");
        assert_eq!(Seconds(0.0).to_string(), "0 s");
        assert_eq!(Seconds(3e-10).to_string(), "0.3 ns");
        assert_eq!(Seconds(0.9999).to_string(), "1 s");
        assert_eq!(BytesPerSecond(450e9).to_string(), "450 GB/s");
        assert_eq!(FlopsPerSecond(989e12).to_string(), "989 TFLOPS");
        assert_eq!(Ratio(0.493).to_string(), "49.3 %");
    }

    #[test]
    fn spellings() {
        assert_eq!("72GiB".parse(), Ok(Bytes(72 << 30)));
        assert_eq!("1_000 B".parse(), Ok(Bytes(1000)));
        assert_eq!("2e-6 s".parse(), Ok(Seconds(2e-6)));
        assert_eq!("2 %".parse(), Ok(Ratio(0.02)));
        assert_eq!("400 Gbit/s".parse(), Ok(BytesPerSecond(50e9)));
        assert!("72 gib".parse::<Bytes>().is_err());
        assert!("GiB".parse::<Bytes>().is_err());
        assert!("-1 B".parse::<Bytes>().is_err());
        assert!("1e30 GiB".parse::<Bytes>().is_err());
        let message = "60 s".parse::<Bytes>().map_err(|error| error.to_string());
        assert_eq!(
            message,
            Err("`60 s` is a time, but a size in bytes is needed, such as `72 GiB`".to_owned())
        );
    }

    proptest::proptest! {
        #[test]
        fn exact_text_reparses(n in 0..(1u64 << 62), x in 1e-12..1e18f64) {
            proptest::prop_assert_eq!(format!("{:#}", Bytes(n)).parse(), Ok(Bytes(n)));
            proptest::prop_assert_eq!(format!("{:#}", Seconds(x)).parse(), Ok(Seconds(x)));
            proptest::prop_assert_eq!(format!("{:#}", Flops(x)).parse(), Ok(Flops(x)));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,12}") {
            let _ = text.parse::<Quantity>();
        }
    }
}
