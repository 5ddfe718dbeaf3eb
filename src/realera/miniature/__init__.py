"""Builds the miniature: draws its training pictures, trains its parts, measures the result. No other part of the
package imports this one."""
