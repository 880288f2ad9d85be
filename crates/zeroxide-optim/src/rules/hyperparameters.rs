//! What a rule can be told: names, values, and the range of each where the update is defined.

use crate::error::OptimError;

/// What a hyperparameter is set to.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Value {
    /// A number.
    Number(f64),
    /// A switch.
    Flag(bool),
}

/// One hyperparameter of a rule.
#[derive(Clone, Copy, Debug)]
pub struct Hyperparameter {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub meaning: &'static str,
    /// What it is unless it is set.
    pub default: Value,
    /// What it may be, in words; empty for a switch.
    pub expected: &'static str,
}

/// A type of hyperparameters.
pub(crate) trait Setting: Copy {
    /// `self` as a value of any type.
    fn value(self) -> Value;

    /// `value` where it is of this type.
    fn of(value: Value) -> Option<Self>;
}

impl Setting for f64 {
    fn value(self) -> Value {
        Value::Number(self)
    }

    fn of(value: Value) -> Option<Self> {
        match value {
            Value::Number(number) => Some(number),
            Value::Flag(_) => None,
        }
    }
}

impl Setting for bool {
    fn value(self) -> Value {
        Value::Flag(self)
    }

    fn of(value: Value) -> Option<Self> {
        match value {
            Value::Flag(flag) => Some(flag),
            Value::Number(_) => None,
        }
    }
}

/// A struct that `hyperparameters!` has made.
pub(crate) trait Fields {
    /// Its fields, in their order.
    fn fields() -> Vec<Hyperparameter>;

    /// Sets the field of that name; `false` where there is none, or it is of another type.
    fn set(&mut self, name: &str, value: Value) -> bool;

    /// Compares every number with its range, in their order; the error names the first that is outside.
    fn in_range(&self) -> Result<(), OptimError>;
}

/// Defines the hyperparameters of a rule: a struct with its defaults, and its [`Fields`]. A number is followed by `in`
/// and the [`Range`] that it must be in.
macro_rules! hyperparameters {
    (
        $(#[$meta:meta])*
        pub struct $params:ident {
            $($(#[doc = $doc:literal])* $field:ident: $ty:ident $(in $range:ident)? = $default:literal),* $(,)?
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Debug)]
        pub struct $params {
            $($(#[doc = $doc])* pub $field: $ty),*
        }

        impl Default for $params {
            fn default() -> Self {
                Self { $($field: $default),* }
            }
        }

        impl $crate::rules::Fields for $params {
            fn fields() -> Vec<$crate::rules::Hyperparameter> {
                vec![$($crate::rules::Hyperparameter {
                    name: stringify!($field),
                    meaning: concat!($($doc),*).trim(),
                    default: $crate::rules::Setting::value($default),
                    expected: [$($crate::rules::Range::$range.words())?]
                        .first()
                        .copied()
                        .unwrap_or_default(),
                }),*]
            }

            fn set(&mut self, name: &str, value: $crate::rules::Value) -> bool {
                match name {
                    $(stringify!($field) => $crate::rules::Setting::of(value)
                        .map(|value| self.$field = value)
                        .is_some(),)*
                    _ => false,
                }
            }

            fn in_range(&self) -> Result<(), $crate::error::OptimError> {
                $($($crate::rules::Range::$range.check(stringify!($field), self.$field)?;)?)*
                Ok(())
            }
        }
    };
}

pub(crate) use hyperparameters;

/// What a number may be.
#[derive(Clone, Copy)]
pub(crate) enum Range {
    /// A number that fp32 can hold, not negative.
    NonNegative,
    /// In `[0, 1)`.
    BelowOne,
    /// Any number that fp32 can hold.
    Finite,
    /// Zero, or large enough to have a reciprocal after what the rule multiplies it with.
    Epsilon,
}

/// The smallest `eps` but zero: `eps sqrt(1 - beta2^t)`, whose root is 2^-27 at least, must have a reciprocal in fp32.
const MIN_EPS: f64 = 1e-30;

impl Range {
    // The kernels hold every constant as fp32. An eps below MIN_EPS loses its reciprocal there.
    #[expect(clippy::cast_possible_truncation, reason = "overflow is looked for")]
    fn holds(self, value: f64) -> bool {
        let finite = (value as f32).is_finite();
        match self {
            Self::NonNegative => finite && value >= 0.0,
            Self::BelowOne => (0.0..1.0).contains(&value),
            Self::Finite => finite,
            Self::Epsilon => finite && (value == 0.0 || value >= MIN_EPS),
        }
    }

    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::NonNegative => "a finite number that is not negative",
            Self::BelowOne => "a number in [0, 1)",
            Self::Finite => "a finite number",
            Self::Epsilon => "0, or a number from 1e-30 to 3e38",
        }
    }

    /// Checks the number called `name`.
    pub(crate) fn check(self, name: &'static str, value: f64) -> Result<(), OptimError> {
        if self.holds(value) {
            return Ok(());
        }
        Err(OptimError::Hyperparameter {
            name,
            value,
            expected: self.words(),
        })
    }
}
